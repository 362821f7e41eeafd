"""Runs the benchmark: ``python -m bench --help``."""

from __future__ import annotations

import argparse
import gc
import os
import re
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

try:
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, track
except ImportError:
    raise SystemExit("the benchmark prints with rich. Run: pip install 'moe_ext[bench]'") from None

from . import (
    bench_all_to_all,
    bench_experts,
    bench_gating,
    bench_grouped_gemm,
    bench_lora,
    bench_permutation,
    bench_plan,
    compare,
    dispatch_bytes,
    headline,
    html_report,
    language_model,
    machine,
    memory,
    model_layers,
    report,
    scaling,
    tune_tiles,
    zero_computation,
)
from .case import Case, Cases, Context, first_line
from .gpu_names import TILE_VARIABLE
from .timing import Timer
from .watchdog import watch

MODULES = (bench_experts, bench_grouped_gemm, bench_gating, bench_plan, bench_permutation, bench_lora, bench_all_to_all)
TRAINING_STEPS = {"gpu": 300, "cpu": 200, "quick": 3}
SECONDS_PER_CASE = {"gpu": 2.0, "cpu": 1.5, "quick": 0.05}
# How many cases there will be is known only when they are made.
PROGRESS = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}"), TimeElapsedColumn())
# Without the folder of the results, which is the machine's own affair.
COMMAND = re.sub(r" --out[= ]\S+", "", " ".join(["python -m bench", *sys.argv[1:]]))
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEFAULT_TABLES = {"cpu": ["A", "B", "C", "D"], "cpu-full": ["A", "D"]}
DEFAULT_DTYPES = {"gpu": ["bfloat16"], "cpu": ["float32", "bfloat16"], "quick": ["float32"]}


def add_run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--profile", choices=["cpu", "cpu-full", "gpu", "quick", "quick-full"],
                        help="cpu-full: layers and decode at more shapes; default: gpu where there is one, "
                        "else cpu")  # fmt: skip
    parser.add_argument("--ops", nargs="+", metavar="OP", help="only these ops (names of csrc/schemas.cpp)")
    parser.add_argument("--tables", help="only these tables, comma-separated: A layers, B products, C memory-bound, "
                        "D decode, scaling, memory, zero (default: A,B,C,D; of cpu-full: A,D)")  # fmt: skip
    parser.add_argument("--shapes", nargs="+", metavar="NAME", help="only these layers of tables A, D and memory "
                        "(names of bench/shapes.py)")  # fmt: skip


def add_measure_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), help="default: bfloat16 on a GPU, float32 and "
                        "bfloat16 on a CPU")  # fmt: skip
    parser.add_argument("--backend", choices=["cpu", "cuda"], help="default: cuda where there is a GPU")
    parser.add_argument("--peers", nargs="+", metavar="NAME", help="only peers whose name holds one of these words, "
                        "'none' for no peer; table memory has all")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=15, help="at most this many rounds per case (default: 15)")
    parser.add_argument("--seconds", type=float, help="no further round of a case starts after so long (default: 2 on "
                        "a GPU, 1.5 on a CPU)")  # fmt: skip
    parser.add_argument("--case-seconds", type=float, metavar="SECONDS", help="a case that takes longer hangs: what is "
                        "measured is saved, the process ends (default: no limit)")  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the JSON file (default: out)")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options of one subcommand; without the name of one they are those of ``run``."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="moe-bench", description="Times moe_ext's ops against their peers.")
    commands = parser.add_subparsers(dest="subcommand", required=True, metavar="COMMAND")
    run_parser = commands.add_parser("run", help="measure (what happens without a command)")
    add_run_options(run_parser)
    add_measure_options(run_parser)
    report_parser = commands.add_parser("report", help="result files as Markdown, or as one HTML page with drawings")
    report_parser.add_argument("files", type=Path, nargs="+", metavar="JSON")
    report_parser.add_argument("--html", type=Path, metavar="PAGE", help="write a page that needs nothing else there, "
                               "instead of printing Markdown")  # fmt: skip
    headline_parser = commands.add_parser("headline", help="the few figures of a README from result files, as Markdown")
    headline_parser.add_argument("files", type=Path, nargs="+", metavar="JSON")
    headline_parser.add_argument("--page", type=Path, help="write them between the marks of this page instead")
    compare_parser = commands.add_parser("compare", help="two result files; exit status 1 if something became slower")
    compare_parser.add_argument("old", type=Path)
    compare_parser.add_argument("new", type=Path)
    compare_parser.add_argument("--threshold", type=float, default=5.0, metavar="PERCENT",
                                help="a median this much longer counts (default: 5)")  # fmt: skip
    compare_parser.add_argument("--alpha", type=float, default=0.05,
                                help="and only if chance gives the samples no more often (default: 0.05)")  # fmt: skip
    compare_parser.add_argument("--all", action="store_true", help="list rows that did not change too")
    shapes_parser = commands.add_parser("shapes", help="what the layers of a model would cost here")
    shapes_parser.add_argument("config", type=Path, help="a Hugging Face config.json, or its folder")
    shapes_parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 512], help="default: 1 16 512")
    shapes_parser.add_argument("--backward", action="store_true", help="training too")
    add_measure_options(shapes_parser)
    tiles_parser = commands.add_parser("tune-tiles", help="time every compiled sm_90a tile on the shapes of table B, "
                                       "say which is fastest and which the cost model chooses")  # fmt: skip
    add_measure_options(tiles_parser)
    tiles_parser.add_argument("--tiles", nargs="+", metavar="TILE", help="only these (default: all)")
    bytes_parser = commands.add_parser("dispatch-bytes", help="what an all-to-all moves for published models, as "
                                       "Markdown; times are simulated from these inputs")  # fmt: skip
    bytes_parser.add_argument("--tokens", type=int, default=4096, help="of each rank (default: 4096)")
    bytes_parser.add_argument("--latency", type=float, default=10.0, metavar="US", help="per message (default: 10)")
    bytes_parser.add_argument("--bandwidth", type=float, default=50.0, metavar="GB/S", help="per rank (default: 50)")
    bytes_parser.add_argument(
        "--bottleneck", type=int, default=4, help="BigMac's hidden size over its own (default: 4)"
    )
    if not arguments or (arguments[0] not in commands.choices and arguments[0] not in ("-h", "--help")):
        arguments = ["run", *arguments]
    return parser.parse_args(arguments)


def train_router(context: Context) -> dict[str, Any]:
    """Trains the byte language model and leaves its routing in ``context.traces``."""
    steps, done = TRAINING_STEPS[context.profile], []
    start = time.perf_counter()
    for _ in track(
        language_model.train_steps(steps, "kernels", context.device, 0, done), "training a router", total=steps
    ):
        pass
    context.traces["ids"] = language_model.record_routing(done[0], 8192, context.device)
    context.traces["num_experts"] = torch.tensor(language_model.NUM_EXPERTS)
    return {"seconds": time.perf_counter() - start, "losses": done[0].losses}


def try_to_train(context: Context) -> dict[str, Any] | None:
    """Without a trained router there is no routing "real"; the other rows are worth their time."""
    try:
        return train_router(context)
    except Exception as error:
        context.traces.clear()
        context.errors.append(f"training a router: {first_line(error)}")
        return None


def cases(context: Context) -> Cases:
    asked = [(module, module.TABLES) for module in MODULES]
    for module, tables in (*asked, (scaling, ("scaling",)), (zero_computation, (zero_computation.TABLE,))):
        if context.tables & set(tables):
            yield from context.attempt(module.__name__, module.cases(context))


def device_of(options: argparse.Namespace) -> str:
    """cpu or cuda: the backend that is asked for, else what the profile means, else the GPU where there is one."""
    profile = getattr(options, "profile", None) or ""
    implied = "cpu" if profile.startswith("cpu") else "cuda" if profile == "gpu" else None
    device = options.backend or implied or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no GPU: torch.cuda.is_available() is False")
    return device


def make_context(options: argparse.Namespace) -> Context:
    """What the options ask for; raises SystemExit where they ask for nothing that there is."""
    device = device_of(options)
    chosen = options.profile or ("gpu" if device == "cuda" else "cpu")
    profile = chosen.removesuffix("-full")
    if profile != "quick" and (profile == "gpu") != (device == "cuda"):
        raise SystemExit(f"--profile {chosen}: expected another one for the backend {device}")
    tables = options.tables.split(",") if options.tables else DEFAULT_TABLES.get(chosen, DEFAULT_TABLES["cpu"])
    measured = [table for table in report.TABLES if table != "model"]  # that one is the subcommand shapes
    if unknown := set(tables) - set(measured):
        raise SystemExit(f"--tables: expected some of {','.join(measured)}, got {','.join(sorted(unknown))}")
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


def is_wanted(case: Case, context: Context, options: argparse.Namespace) -> bool:
    return case.table in context.tables and (not options.ops or case.op in options.ops)


@dataclass
class Measured:
    """What is known so far: a row for each case, a line for each that raised."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


def exit_if_wrong(errors: list[str], what: str) -> None:
    if errors:
        raise SystemExit(f"{len(errors)} {what}:\n" + "\n".join(errors))


def measure(
    measured: Iterable[Case],
    timer: Timer,
    about: dict[str, Any],
    peers: list[str] | None,
    progress: Progress,
    save: Callable[[Measured], None],
    errors: list[str] | None = None,
    case_seconds: float | None = None,
) -> Measured:
    """Each case is made as it is reached: inputs of all would not fit memory. ``save`` is called after each, so that a
    run that is ended early, by a case that takes longer than ``case_seconds`` too, leaves what it measured. ``errors``
    is where those are told that could not be made."""
    found = Measured(errors=[] if errors is None else errors)
    task = progress.add_task("measuring", total=None)
    gc.freeze()  # imports alone are half a million objects, which each collection below would visit

    def hangs(line: str) -> None:
        found.errors.append(line)
        save(found)

    following, label = iter(measured), "the start"
    while True:
        with watch(f"what follows {label}", case_seconds, hangs):
            case = next(following, None)
        if case is None:
            return found
        if peers is not None:
            words = [word.lower() for word in peers]
            case.peers = {name: run for name, run in case.peers.items() if any(word in name.lower() for word in words)}
        label = f"{case.op} {case.name} {case.direction}"
        progress.update(task, description=label, advance=1)
        torch.set_num_threads(case.threads or about["threads"])
        try:
            with watch(label, case_seconds, hangs):
                differences = case.check_peers()
                timings = timer.compare({"ours": case.ours, **case.peers, **case.ceilings})
            found.rows.append(report.make_row(case, timings, differences, about))
        except Exception as error:  # one case, maybe one peer of it: the others are worth their time
            found.errors.append(f"{label}: {type(error).__name__}: {str(error)[:500]}")
            print(found.errors[-1], file=sys.stderr, flush=True)
        torch.set_num_threads(about["threads"])
        save(found)
        if found.errors and timer.device_is_lost():
            return found
        del case
        gc.collect()


def forced_tile() -> dict[str, str]:
    """A note for the result where the cost model's choice is overruled."""
    tile = os.environ.get(TILE_VARIABLE)
    return {"note": f"Every grouped product on sm_90a was forced to the tile {tile} ({TILE_VARIABLE})."} if tile else {}


def run(options: argparse.Namespace) -> Path:
    """All cases that the options ask for; returns the JSON file."""
    context = make_context(options)
    torch.manual_seed(0)
    start, about = time.perf_counter(), machine.describe(context.device)
    timer = Timer(context.device, options.rounds, options.seconds or SECONDS_PER_CASE[context.profile])
    path = options.out / file_name(options, context, about)
    training = None

    def save(found: Measured) -> None:
        extra = {"command": COMMAND, "profile": options.profile or context.profile, "errors": found.errors,
                 "seconds": time.perf_counter() - start, "training": training, **forced_tile()}  # fmt: skip
        report.write_json(path, about, found.rows, extra)

    if "A" in context.tables and not (options.ops or options.shapes):
        with watch("training a router", options.case_seconds, lambda line: save(Measured(errors=[line]))):
            training = try_to_train(context)

    with Progress(*PROGRESS, transient=True) as progress:
        wanted = filter(lambda case: is_wanted(case, context, options), cases(context))
        found = measure(wanted, timer, about, options.peers, progress, save, context.errors, options.case_seconds)
        if "memory" in context.tables:
            progress.add_task("peak memory", total=None)
            context.weights.clear()
            found.rows += memory.rows(context)
    save(found)
    report.print_tables(found.rows)
    print(f"{len(found.rows)} rows in {path}")
    exit_if_wrong(found.errors, "cases could not be measured")
    return path


def run_shapes(options: argparse.Namespace) -> Path:
    """The layers of the model that a config.json describes; returns the JSON file."""
    from rich.console import Console
    from rich.table import Table

    layers = model_layers.read_config(options.config)
    device = device_of(options)
    profile = "gpu" if device == "cuda" else "cpu"
    context = Context(device, profile, [DTYPES[name] for name in options.dtype or DEFAULT_DTYPES[profile]])
    shape = layers.shape
    print(f"{shape.name}: {layers.num_layers} layers with experts, H={shape.hidden_size} I={shape.intermediate_size} "
          f"E={shape.num_experts} K={shape.topk}")  # fmt: skip
    model_layers.check_memory(shape, context.dtypes[0], device, backward=options.backward)
    start, about = time.perf_counter(), machine.describe(device)
    timer = Timer(device, options.rounds, options.seconds or SECONDS_PER_CASE[profile])
    path = options.out / f"{shape.name}-{device}.json"

    def save(found: Measured) -> None:
        extra = {"command": COMMAND, "errors": found.errors, "seconds": time.perf_counter() - start}
        report.write_json(path, about, found.rows, extra)

    with Progress(*PROGRESS, transient=True) as progress:
        measured = model_layers.cases(context, layers, options.tokens, backward=options.backward)
        found = measure(measured, timer, about, options.peers, progress, save, context.errors, options.case_seconds)
    table = Table(
        "tokens", "dtype", "direction", "one layer", "all layers", "per token", "tokens/s", title="Expert layers alone"
    )
    for cells in model_layers.summary(layers, found.rows):
        table.add_row(*cells)
    save(found)  # the summary adds to the rows
    report.print_tables(found.rows)
    Console().print(table)
    print(f"{len(found.rows)} rows in {path}")
    exit_if_wrong(found.errors, "cases could not be measured")
    return path


def run_tuner(options: argparse.Namespace) -> Path:
    """The tile sweep; returns the JSON file, which ``report`` prints as a table."""
    context = Context("cuda", "gpu", [DTYPES[name] for name in options.dtype or DEFAULT_DTYPES["gpu"]])
    if not torch.cuda.is_available():
        raise SystemExit("tune-tiles: no GPU: torch.cuda.is_available() is False")
    timer, about = Timer("cuda", options.rounds, SECONDS_PER_CASE["gpu"]), machine.describe("cuda")
    path = options.out / f"{about['gpu'].lower().replace(' ', '-')}-tiles.json"

    def save(sweep: tune_tiles.Sweep) -> None:
        report.write_json(path, about, [], {"command": COMMAND, "errors": sweep.errors, "tiles": sweep.rows})

    sweep = tune_tiles.Sweep(save, product_seconds=options.case_seconds)
    tune_tiles.tune(context, timer.compare, sweep, options.tiles)
    print("\n".join(report.tile_table(sweep.rows)))
    print(f"{len(sweep.rows)} products in {path}")
    exit_if_wrong(sweep.errors, "tiles could not be timed on a product")
    return path


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if options.subcommand == "report" and options.html:
        options.html.write_text(html_report.page(options.files))
        print(f"{len(options.files)} result files in {options.html}")
    elif options.subcommand == "report":
        print(report.page(options.files))
    elif options.subcommand == "headline":
        text = headline.headline(options.files)
        headline.write_into(options.page, text) if options.page else print(text, end="")
    elif options.subcommand == "compare":
        sys.exit(compare.main(options.old, options.new, options.threshold / 100, options.alpha, options.all))
    elif options.subcommand == "dispatch-bytes":
        link = dispatch_bytes.Link(options.tokens, options.latency, options.bandwidth, options.bottleneck)
        print(dispatch_bytes.markdown(link), end="")
    else:
        {"run": run, "shapes": run_shapes, "tune-tiles": run_tuner}[options.subcommand](options)


if __name__ == "__main__":
    main()
