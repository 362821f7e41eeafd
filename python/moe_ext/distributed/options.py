"""How rows travel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moe_ext.packed_row import Payload

Form = Literal["dedup", "slot", "node"]
Overflow = Literal["raise", "drop"]
FORMS, OVERFLOWS, PAYLOADS = ("dedup", "slot", "node"), ("raise", "drop"), ("native", "fp8")


@dataclass(frozen=True)
class DispatchOptions:
    """How rows travel; the same on all ranks.

    Args:
        form: ``dedup``: once to each rank; ``slot``: once for each expert; ``node``, over a
            :class:`HierarchicalExchange`: once to each node, and from there once to each of its ranks.
        rows_per_rank: None for exact sizes; else the rows that a rank sends to each rank, in each chunk; with ``node``
            to each rank of its node.
        overflow: what happens to rows beyond ``rows_per_rank``. ``raise``: an error on every rank (on CUDA a device
            assertion, so that nothing syncs); ``drop``: they are left out, the last tokens first, contribute zeros and
            get zero gradients, and ``dropped_rows`` counts them.
        payload: ``native``, or ``fp8`` for e4m3 with 1x128 scales on the way to the experts.
        debug: cross-check arguments, ids and splits of all ranks before the payload moves (syncs); None: if the
            environment has ``MOE_EXT_DEBUG_SPLITS=1``.
        rows_per_node: with ``node`` and ``rows_per_rank``: the rows that a rank sends to each node, in each chunk.

    Raises:
        ValueError: an option is none of these; the message names it.
    """

    form: Form = "dedup"
    rows_per_rank: int | None = None
    overflow: Overflow = "raise"
    payload: Payload = "native"
    debug: bool | None = None
    rows_per_node: int | None = None

    def __post_init__(self) -> None:
        for name, value, known in (
            ("form", self.form, FORMS), ("overflow", self.overflow, OVERFLOWS), ("payload", self.payload, PAYLOADS),
        ):  # fmt: skip
            if value not in known:
                raise ValueError(f"{name}: expected {' or '.join(known)}, got {value!r}")
        for name, bound in (("rows_per_rank", self.rows_per_rank), ("rows_per_node", self.rows_per_node)):
            if bound is not None and bound < 1:
                raise ValueError(f"{name}: expected None or an integer >= 1, got {bound}")
        wanted = self.form == "node" and self.rows_per_rank is not None
        if wanted != (self.rows_per_node is not None):
            raise ValueError(
                "rows_per_node: expected with form='node' and rows_per_rank, and only then, got "
                f"{self.rows_per_node} with form={self.form!r} and rows_per_rank={self.rows_per_rank}"
            )
