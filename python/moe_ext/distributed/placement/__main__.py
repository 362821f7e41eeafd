"""``python -m moe_ext.distributed.placement trace.npz --ranks 32 --out placement.json``: plan, judge, draw."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence

import numpy as np

from moe_ext.distributed.placement.eplb import balance_experts, rebalance_experts
from moe_ext.distributed.placement.layout import ExpertPlacement
from moe_ext.distributed.placement.moetuner import moetuner_placement
from moe_ext.distributed.placement.plot import plot_rank_loads
from moe_ext.distributed.placement.simulation import Cluster, Link, SimulatedStep, simulate_step
from moe_ext.distributed.traces import RoutingTrace


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m moe_ext.distributed.placement",
        description="Plans a placement of experts from the first part of a routing trace and judges it on the rest.",
    )
    parser.add_argument("trace", help="npz file of RoutingTrace.save")
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--ranks-per-node", type=int, help="default: all ranks on one node")
    parser.add_argument("--method", choices=["eplb", "rebalance", "moetuner"], default="eplb")
    parser.add_argument(
        "--redundant", type=int, default=0, metavar="N", help="eplb: physical experts beyond the experts"
    )
    parser.add_argument("--groups", type=int, default=1, help="eplb: expert groups of group-limited routing")
    parser.add_argument("--old", metavar="JSON", help="the placement in use; needed by rebalance, default: in order")
    parser.add_argument("--max-moves", type=int, default=8, help="rebalance: experts to move per layer")
    parser.add_argument("--time-limit", type=float, default=60.0, help="moetuner: seconds for each program")
    parser.add_argument("--profile-fraction", type=float, default=0.5, help="of the tokens, to plan with")
    parser.add_argument("--out", metavar="JSON", help="write the placement here")
    parser.add_argument("--plot", metavar="PNG", help="draw the held-out load per rank here")
    simulation = parser.add_argument_group("simulation", "times are simulated only if all of these are given")
    simulation.add_argument("--intra", type=float, nargs=2, metavar=("SECONDS", "BYTES_PER_SECOND"))
    simulation.add_argument("--inter", type=float, nargs=2, metavar=("SECONDS", "BYTES_PER_SECOND"))
    simulation.add_argument("--seconds-per-row", type=float)
    parser.add_argument("--hidden-size", type=int, default=1, help="default 1: bytes are per element of a row")
    parser.add_argument("--all-to-all", choices=["per_slot", "per_rank", "per_node"], default="per_rank")
    return parser


def _plan(arguments: argparse.Namespace, profile: RoutingTrace, old: ExpertPlacement) -> ExpertPlacement:
    ranks, per_node = arguments.ranks, arguments.ranks_per_node
    if arguments.method == "rebalance":
        return rebalance_experts(profile.counts, old, max_moves=arguments.max_moves)
    if arguments.method == "eplb":
        slots, nodes = profile.num_experts + arguments.redundant, ranks // per_node
        return balance_experts(profile.counts, slots, num_ranks=ranks, num_nodes=nodes, num_groups=arguments.groups)
    if profile.transitions is None:
        raise ValueError(f"{arguments.trace}: moetuner needs a trace with transitions")
    costs = None
    if arguments.intra and arguments.inter:
        node = np.arange(ranks) // per_node
        costs = np.where(node[:, None] == node[None, :], 1 / arguments.intra[1], 1 / arguments.inter[1])
        np.fill_diagonal(costs, 0.0)
    limit = arguments.time_limit
    return moetuner_placement(profile.counts, profile.transitions, ranks, seconds_per_byte=costs, time_limit=limit)


def _print_report(steps: dict[str, SimulatedStep], with_times: bool) -> None:
    summaries = {name: step.summary() for name, step in steps.items()}
    print(f"{'on held-out tokens':30s}" + "".join(f"{name:>14s}" for name in summaries))
    for figure in next(iter(summaries.values())):
        if with_times or not figure.startswith("simulated"):
            values = "".join(f"{summary[figure]:14.6g}" for summary in summaries.values())
            print(f"{figure.replace('_', ' '):30s}{values}")


def _run(arguments: argparse.Namespace) -> None:
    if arguments.ranks < 1:
        raise ValueError(f"--ranks: expected at least 1, got {arguments.ranks}")
    trace = RoutingTrace.load(arguments.trace)
    arguments.ranks_per_node = arguments.ranks_per_node or arguments.ranks
    timing = (arguments.intra, arguments.inter, arguments.seconds_per_row)
    with_times = all(value is not None for value in timing)
    if not with_times and any(value is not None for value in timing):
        raise ValueError("--intra, --inter and --seconds-per-row go together")
    intra, inter = (Link(*given) if with_times else Link(0.0, math.inf) for given in (arguments.intra, arguments.inter))
    cluster = Cluster(arguments.ranks, arguments.ranks_per_node, intra, inter, arguments.seconds_per_row or 0.0)
    profile, held_out = trace.split(arguments.profile_fraction)
    if arguments.old:
        old = ExpertPlacement.load(arguments.old)
    elif arguments.method == "rebalance":
        raise ValueError("--method rebalance needs --old")
    else:
        # In order; where the ranks do not divide the experts, the last slots hold the first experts again.
        slots = math.ceil(trace.num_experts / arguments.ranks) * arguments.ranks
        in_order = np.tile(np.arange(slots) % trace.num_experts, (len(trace.counts), 1))
        old = ExpertPlacement.from_phy2log(in_order, trace.num_experts, arguments.ranks)
    new = _plan(arguments, profile, old)
    steps = {
        name: simulate_step(
            held_out, placement, cluster, hidden_size=arguments.hidden_size, all_to_all=arguments.all_to_all
        )
        for name, placement in (("old", old), (arguments.method, new))
    }
    if with_times:
        print(f"simulated cluster: {cluster}")
    _print_report(steps, with_times)
    if new.num_slots == old.num_slots:
        print(f"experts moved per layer, at most: {new.moves_from(old).max(initial=0)}")
    if arguments.out:
        new.save(arguments.out)
    if arguments.plot:
        before, after = (step.rows for step in steps.values())
        plot_rank_loads(before, after, arguments.plot, before_name="old", after_name=arguments.method)


def main(command_line: Sequence[str] | None = None) -> int:
    parser = _parser()
    arguments = parser.parse_args(command_line)
    try:
        _run(arguments)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
