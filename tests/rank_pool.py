"""Processes that stay: one per rank, over gloo, each asked to run one function after another."""

from __future__ import annotations

import io
import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing


def _serve(rank: int, num_ranks: int, store: str, timeout: float, pipe: Connection) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=num_ranks, timeout=timedelta(seconds=timeout)
    )
    # Groups of the first n ranks, so that one set of processes serves every number of ranks.
    groups = {n: dist.new_group(list(range(n))) for n in range(1, num_ranks)}
    groups[num_ranks] = dist.group.WORLD
    pipe.send_bytes(b"ready")
    while request := pipe.recv():
        function, size, arguments = request
        answer = io.BytesIO()
        try:
            torch.save((True, function(groups[size], *arguments)), answer)
        except BaseException as error:
            answer = io.BytesIO()
            torch.save((False, (f"{type(error).__name__}: {error}", traceback.format_exc())), answer)
        pipe.send_bytes(answer.getvalue())
    dist.destroy_process_group()


class RankError(Exception):
    """A function failed on a rank; the traceback is that of the process."""


class RankPool:
    """``num_ranks`` processes. Functions must be at the top level of a module that the processes can import."""

    def __init__(self, num_ranks: int, folder: Any, timeout: float = 60.0) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipes, self.processes = [], []
        for rank in range(num_ranks):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, num_ranks, f"{folder}/store", timeout, theirs), daemon=True
            )
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)
        for pipe in self.pipes:
            assert pipe.recv_bytes() == b"ready"

    def start(self, num_ranks: int, function: Callable[..., Any], *arguments: Any) -> None:
        for pipe in self.pipes[:num_ranks]:
            pipe.send((function, num_ranks, arguments))

    def outcomes(self, ranks: list[int], patience: float = 120.0) -> list[tuple[bool, Any]]:
        """(True, result) or (False, (message, traceback)) of each rank."""
        answers = []
        for rank in ranks:
            if not self.pipes[rank].poll(patience):
                raise RankError(f"rank {rank} does not answer")
            answers.append(torch.load(io.BytesIO(self.pipes[rank].recv_bytes()), weights_only=False))
        return answers

    def run(self, num_ranks: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """``function(group, *arguments)`` on the first ``num_ranks`` ranks; what each returned."""
        self.start(num_ranks, function, *arguments)
        answers = self.outcomes(list(range(num_ranks)))
        for rank, (fine, answer) in enumerate(answers):
            if not fine:
                raise RankError(f"rank {rank}: {answer[1]}")
        return [answer for _, answer in answers]

    def __enter__(self) -> RankPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            if process.is_alive():
                pipe.send(None)
        for process in self.processes:
            process.join(10)
            if process.is_alive():
                process.kill()
