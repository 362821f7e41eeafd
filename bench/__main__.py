"""Runs the benchmark: ``python -m bench --help``."""

from __future__ import annotations

import argparse
import gc
import sys
import time
from pathlib import Path
from typing import Any

import torch

from . import (
    bench_all_to_all,
    bench_experts,
    bench_gating,
    bench_grouped_gemm,
    bench_permutation,
    bench_plan,
    language_model,
    machine,
    memory,
    report,
    scaling,
    tune_tiles,
    zero_computation,
)
from .case import Cases, Context
from .timing import Timer

MODULES = (bench_experts, bench_grouped_gemm, bench_gating, bench_plan, bench_permutation, bench_all_to_all)
TRAINING_STEPS = {"gpu": 300, "cpu": 200, "quick": 3}
SECONDS_PER_CASE = {"gpu": 2.0, "cpu": 1.5, "quick": 0.05}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEFAULT_TABLES = {"cpu": ["A", "B", "C", "D"], "cpu-full": ["A", "D"]}
DEFAULT_DTYPES = {"gpu": ["bfloat16"], "cpu": ["float32", "bfloat16"], "quick": ["float32"]}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="moe-bench", description="Times moe_ext's ops against their peers.")
    parser.add_argument("--profile", choices=["cpu", "cpu-full", "gpu", "quick", "quick-full"],
                        help="cpu-full: layers and decode at more shapes; default: gpu where there is one, "
                        "else cpu")  # fmt: skip
    parser.add_argument("--ops", nargs="+", metavar="OP", help="only these ops (names of csrc/schemas.cpp)")
    parser.add_argument("--tables", help="only these tables, comma-separated: A layers, B products, C memory-bound, "
                        "D decode, scaling, memory, zero (default: A,B,C,D; of cpu-full: A,D)")  # fmt: skip
    parser.add_argument("--shapes", nargs="+", metavar="NAME", help="only these layers of tables A, D and memory "
                        "(names of bench/shapes.py)")  # fmt: skip
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), help="default: bfloat16 on a GPU, float32 and "
                        "bfloat16 on a CPU")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=15, help="at most this many rounds per case (default: 15)")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the JSON file (default: out)")
    parser.add_argument("--tune-tiles", action="store_true", help="time every compiled sm_90a tile on the shapes of "
                        "table B instead, and write which is fastest and which the cost model chooses")  # fmt: skip
    parser.add_argument(
        "--markdown", type=Path, nargs="+", metavar="JSON", help="print result files as Markdown and end"
    )
    return parser.parse_args(arguments)


def train_router(context: Context) -> dict[str, Any]:
    """Trains the byte language model and leaves its routing in ``context.traces``."""
    from rich.progress import track

    steps, done = TRAINING_STEPS[context.profile], []
    start = time.perf_counter()
    for _ in track(
        language_model.train_steps(steps, "kernels", context.device, 0, done), "training a router", total=steps
    ):
        pass
    context.traces["ids"] = language_model.record_routing(done[0], 8192, context.device)
    context.traces["num_experts"] = torch.tensor(language_model.NUM_EXPERTS)
    return {"seconds": time.perf_counter() - start, "losses": done[0].losses}


def cases(context: Context) -> Cases:
    for module in MODULES:
        if context.tables & set(module.TABLES):
            yield from module.cases(context)
    if "scaling" in context.tables:
        yield from scaling.cases(context)
    if zero_computation.TABLE in context.tables:
        yield from zero_computation.cases(context)


def make_context(options: argparse.Namespace) -> Context:
    """What the options ask for; raises SystemExit where they ask for nothing that there is."""
    chosen = options.profile or ("gpu" if torch.cuda.is_available() else "cpu")
    profile = chosen.removesuffix("-full")
    device = "cuda" if profile == "gpu" or (profile == "quick" and torch.cuda.is_available()) else "cpu"
    tables = options.tables.split(",") if options.tables else DEFAULT_TABLES.get(chosen, DEFAULT_TABLES["cpu"])
    if unknown := set(tables) - set(report.TABLES):
        raise SystemExit(f"--tables: expected some of {','.join(report.TABLES)}, got {','.join(sorted(unknown))}")
    known = {op for module in MODULES for op in module.OPS}
    if unknown := set(options.ops or ()) - known:
        raise SystemExit(f"--ops: unknown {', '.join(sorted(unknown))}; known: {', '.join(sorted(known))}")
    dtypes = [DTYPES[name] for name in options.dtype or DEFAULT_DTYPES[profile]]
    context = Context(device, profile, dtypes, set(tables), chosen.endswith("-full"), options.shapes)
    if options.shapes and not (bench_experts.layers_of(context) or bench_experts.decode_of(context)):
        raise SystemExit(f"--shapes: none of {', '.join(options.shapes)} in profile {chosen}")
    return context


def file_name(options: argparse.Namespace, context: Context, about: dict[str, Any]) -> str:
    """Machine, profile, and whatever the options left out."""
    parts = [about["gpu"].lower().replace(" ", "-") if "gpu" in about else f"cpu-{about['threads']}-threads"]
    parts += ["quick"] if context.profile == "quick" else []
    parts += ["full"] if context.full else []
    parts += [table.lower() for table in sorted(context.tables)] if options.tables else []
    return "-".join([*parts, *(options.shapes or ()), *(options.dtype or ())]) + ".json"


def run(options: argparse.Namespace) -> Path:
    """All cases that the options ask for; returns the JSON file."""
    from rich.progress import Progress

    context = make_context(options)
    torch.manual_seed(0)
    start, about = time.perf_counter(), machine.describe(context.device)
    training = train_router(context) if "A" in context.tables and not (options.ops or options.shapes) else None
    timer = Timer(context.device, options.rounds, SECONDS_PER_CASE[context.profile])
    rows = []
    gc.freeze()  # imports alone are half a million objects, which each collection below would visit
    with Progress(transient=True) as progress:
        task = progress.add_task("measuring", total=None)
        for case in cases(context):
            if case.table not in context.tables or (options.ops and case.op not in options.ops):
                continue
            progress.update(task, description=f"{case.op} {case.name} {case.direction}", advance=1)
            torch.set_num_threads(case.threads or about["threads"])
            differences = case.check_peers()
            timings = timer.compare({"ours": case.ours, **case.peers, **case.ceilings})
            torch.set_num_threads(about["threads"])
            rows.append(report.make_row(case, timings, differences, about))
            del case
            gc.collect()
        if "memory" in context.tables:
            progress.update(task, description="peak memory")
            context.weights.clear()
            rows += memory.rows(context)
    path = options.out / file_name(options, context, about)
    extra = {"command": " ".join(["python -m bench", *sys.argv[1:]]), "profile": options.profile or context.profile,
             "seconds": time.perf_counter() - start, "training": training}  # fmt: skip
    report.write_json(path, about, rows, extra)
    report.print_tables(rows)
    print(f"{len(rows)} rows in {path}")
    return path


def run_tuner(options: argparse.Namespace) -> Path:
    """The tile sweep; returns the JSON file, which --markdown prints as a table."""
    context = Context("cuda", "gpu", [DTYPES[name] for name in options.dtype or DEFAULT_DTYPES["gpu"]])
    if not torch.cuda.is_available():
        raise SystemExit("--tune-tiles: no GPU: torch.cuda.is_available() is False")
    timer = Timer("cuda", options.rounds, SECONDS_PER_CASE["gpu"])
    tiles = tune_tiles.tune(context, timer.compare)
    about = machine.describe("cuda")
    path = options.out / f"{about['gpu'].lower().replace(' ', '-')}-tiles.json"
    report.write_json(path, about, [], {"command": " ".join(["python -m bench", *sys.argv[1:]]), "tiles": tiles})
    print("\n".join(report.tile_table(tiles)))
    print(f"{len(tiles)} products in {path}")
    return path


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if options.markdown:
        print(report.PREAMBLE + "\n".join(report.markdown(path) for path in options.markdown))
        return
    if options.tune_tiles:
        run_tuner(options)
        return
    try:
        import rich  # noqa: F401
    except ImportError:
        raise SystemExit("the benchmark prints with rich. Run: pip install 'moe_ext[bench]'") from None
    run(options)


if __name__ == "__main__":
    main()
