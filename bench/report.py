"""Results as a table in the terminal, as JSON (bench/schema.json says of what), and JSON as Markdown."""

from __future__ import annotations

import json
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

SCHEMA_VERSION = 2  # 2 added the samples of each row
EXPLANATION = """Times are medians of interleaved rounds; speedup is the best peer's time over ours,
so above 1 is faster; every peer's result was compared with ours before it was timed. The ceiling is the share reached
of a dense product of equal FLOPs and, on a CPU, of the peak (the same FLOPs as multiply-adds from register to
register), or of the bandwidth of a copy, measured in the same run; for decode, of reading the weights that are used,
once (on a CPU timed beside the contenders, round by round). Peak memory is what a forward and backward adds to inputs,
weights and incoming gradient, each contender in a process of its own (`bench/memory.py`)."""
TABLES = {
    "A": "Layers",
    "B": "Grouped products",
    "C": "Memory-bound ops",
    "D": "Decode",
    "scaling": "One layer against tokens, experts, threads",
    "memory": "Peak memory above inputs and weights",
    "zero": "Zero-computation experts",
    "model": "Layers of a model",
}
# Over the best peer, of layers with at least hundreds of tokens on a CPU.
WANTED_SPEEDUP = {"forward": 1.3, "forward+backward": 2.0}
COLUMNS = ("op", "shape", "dtype", "routing", "direction", "moe_ext", "best peer", "speedup", "ceiling")
MEMORY_COLUMNS = (*COLUMNS[:-2], "times as much", "of it gradients")


def time_text(seconds: float) -> str:
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def bytes_text(size: float) -> str:
    return f"{size / 1e9:.3g} GB" if size >= 1e9 else f"{size / 1e6:.3g} MB"


def make_row(
    case: Any, timings: dict[str, Any], differences: dict[str, float], machine: dict[str, Any]
) -> dict[str, Any]:
    """One JSON row: seconds of each contender, ratio to the best peer, and how much of each ceiling is reached."""
    ours = timings["ours"].median
    peers = {name: timings[name].median for name in case.peers}
    best = min(peers, key=peers.__getitem__) if peers else None

    def percent(size: float, rate: str) -> float | None:
        return 100 * size / ours / machine[rate] if size else None

    return {
        "op": case.op,
        "table": case.table,
        "shape": case.name,
        "dtype": str(case.dtype).removeprefix("torch."),
        "routing": case.routing,
        "direction": case.direction,
        "seconds": ours,
        "best_seconds": timings["ours"].best,
        "rounds": timings["ours"].rounds,
        "samples": {name: [float(f"{s:.4g}") for s in timings[name].samples] for name in ("ours", *peers)},
        "peer_seconds": peers,
        "peer_difference": differences,
        "skipped_peers": case.skipped_peers,
        **({"differing_peers": case.differing_peers} if case.differing_peers else {}),
        "best_peer": best,
        "speedup_over_best_peer": peers[best] / ours if best else None,
        "ceiling_seconds": {name: timings[name].median for name in case.ceilings},
        "percent_of_ceiling": {name: 100 * timings[name].median / ours for name in case.ceilings},
        "flops_per_second": case.flops / ours if case.flops else None,
        "percent_of_copy_bandwidth": percent(case.bytes, "copy_bytes_per_second"),
        "percent_of_read_bandwidth": percent(case.read_bytes, "read_bytes_per_second"),
    }


def ceiling_text(row: dict[str, Any]) -> str:
    if row.get("percent_of_read_bandwidth"):
        return f"{row['percent_of_read_bandwidth']:.0f}% of read"
    if row["table"] in ("C", "D") and not row["percent_of_ceiling"] and row["percent_of_copy_bandwidth"]:
        return f"{row['percent_of_copy_bandwidth']:.0f}% of copy"
    return ", ".join(f"{percent:.0f}% of {name}" for name, percent in row["percent_of_ceiling"].items())


def out_of_reach(rows: list[dict[str, Any]]) -> list[str]:
    """The layers whose best peer is so near the peak that the speedup aimed at is beyond any implementation."""
    lines = []
    for row in rows:
        peak, wanted = row.get("ceiling_seconds", {}).get("peak"), WANTED_SPEEDUP.get(row["direction"])
        if row["table"] != "A" or not peak or not row["best_peer"] or not wanted:
            continue
        most = row["peer_seconds"][row["best_peer"]] / peak
        if most < wanted:
            lines.append(f"- {row['op']} {row['shape']} {row['dtype']} {row['routing']}: at most {most:.2f}x "
                         f"(wanted: {wanted}x); {row['best_peer']} runs at {100 / most:.0f}% of the peak, moe_ext at "
                         f"{row['percent_of_ceiling']['peak']:.0f}%")  # fmt: skip
    return ["Speedups that the peak allows nobody:", "", *lines, ""] if lines else []


def cells(row: dict[str, Any]) -> list[str]:
    """A row as text, in the order of COLUMNS or MEMORY_COLUMNS."""
    is_memory, best = row["table"] == "memory", row["best_peer"]
    text = bytes_text if is_memory else time_text
    ours, peers = (row["peak_bytes"], row["peer_peak_bytes"]) if is_memory else (row["seconds"], row["peer_seconds"])
    ratio = row["best_peer_over_ours"] if is_memory else row["speedup_over_best_peer"]
    apart = "".join(f"; {name} differs" for name in row.get("differing_peers", ()))
    return [
        row["op"], row["shape"], row["dtype"], row["routing"], row["direction"], text(ours),
        f"{text(peers[best])} ({best}{apart})" if best else "-", f"{ratio:.2f}x" if best else "-",
        bytes_text(row["gradient_bytes"]) if is_memory else ceiling_text(row),
    ]  # fmt: skip


def split(rows: list[dict[str, Any]]) -> list[tuple[str, tuple[str, ...], list[dict[str, Any]]]]:
    """Title, columns and rows of each table that has any."""
    tables = []
    for key, title in TABLES.items():
        mine = [row for row in rows if row["table"] == key]
        columns = MEMORY_COLUMNS if key == "memory" else COLUMNS
        if mine:
            tables.append((f"{key}: {title}" if len(key) == 1 else title, columns, mine))
    return tables


def print_tables(rows: list[dict[str, Any]]) -> None:
    """One rich table for each of TABLES."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 150)
    for title, columns, mine in split(rows):
        table = Table(title=title)
        for column in columns:
            table.add_column(column, justify="left" if column in COLUMNS[:5] else "right")
        for row in mine:
            table.add_row(*cells(row))
        console.print(table)


def write_json(path: Path, machine: dict[str, Any], rows: list[dict[str, Any]], extra: dict[str, Any]) -> None:
    """The result file, as bench/schema.json has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    result = {"schema_version": SCHEMA_VERSION, "machine": machine, **extra, "rows": rows}
    text = json.dumps(result, indent=1)
    # Lists of numbers on one line each: samples would be most of the lines of the file.
    text = re.sub(r"\[[\s\d.,eE+-]*\]", lambda numbers: re.sub(r"\s+", " ", numbers[0]), text)
    with tempfile.TemporaryDirectory() as folder:  # of a folder of results only so many files may come back
        written = Path(folder) / path.name
        written.write_text(text + "\n")
        try:
            written.replace(path)  # whole or not at all: the run may be killed
        except OSError:  # another file system
            shutil.copyfile(written, path)


def tile_summary(rows: list[dict[str, Any]]) -> str:
    right = sum(row["best"] == row["chosen"] for row in rows)
    regrets = [row["regret"] for row in rows if row["regret"] is not None]
    mean, worst = sum(regrets) / max(len(regrets), 1), max(regrets, default=0.0)
    return (f"The model chose the fastest tile for {right} of {len(rows)} products; "
            f"regret {100 * mean:.1f}% on average, {100 * worst:.1f}% at most.")  # fmt: skip


def tile_table(rows: list[dict[str, Any]]) -> list[str]:
    """The choice table: a column for each tile, the fastest in bold, the model's choice with a star."""
    tiles = list(dict.fromkeys(tile for row in rows for tile in row["seconds"]))
    lines = [tile_summary(rows), "",
             "| shape | direction | " + " | ".join(tiles) + " | TFLOP/s | regret |",
             "|---|---|" + "---|" * (len(tiles) + 2)]  # fmt: skip
    for row in rows:
        cells = []
        for tile in tiles:
            text = time_text(row["seconds"][tile]) if tile in row["seconds"] else "-"
            text = f"**{text}**" if tile == row["best"] else text
            cells.append(text + (" *" if tile == row["chosen"] else ""))
        regret = "-" if row["regret"] is None else f"{100 * row['regret']:.1f}%"
        lines.append(f"| {row['shape']} | {row['direction']} | " + " | ".join(cells) +
                     f" | {row['best_flops_per_second'] / 1e12:.0f} | {regret} |")  # fmt: skip
    return [*lines, ""]


def machine_text(machine: dict[str, Any]) -> str:
    """Processor, versions and bandwidths in one line."""
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"
    rates = {name: machine.get(f"{name}_bytes_per_second") for name in ("copy", "read")}
    bandwidths = ", ".join(f"{name} {rate / 1e9:.1f} GB/s" for name, rate in rates.items() if rate)
    return f"{where}; torch {machine['torch']}; commit {machine['commit']}; {bandwidths}"


def explanation(results: list[dict[str, Any]]) -> str:
    """What the figures of these result files mean."""
    measured = any("gpu" in result["machine"] for result in results)
    return EXPLANATION if measured else f"{EXPLANATION}\nNo GPU has been measured yet."


def page(paths: list[Path]) -> str:
    """Result files as a page of Markdown."""
    text = explanation([json.loads(path.read_text()) for path in paths])
    return f"""# Results

Written by `python -m bench report bench/results/*.json`. Each file holds the machine, the versions, every peer's time,
and what was skipped and why.

{text}

""" + "\n".join(map(markdown, paths))


def markdown(path: Path) -> str:
    """A result file as Markdown tables."""
    result = json.loads(path.read_text())
    machine = result["machine"]
    lines = [f"## {path.name}", "", f"{machine_text(machine)}; `{result['command']}`", ""]
    if note := result.get("note"):
        lines += [note, ""]
    if training := result.get("training"):
        losses = training["losses"]
        lines += [
            f"Byte language model: {len(losses)} steps, loss {losses[0]:.2f} to {losses[-1]:.2f} nats per byte, "
            f"{training['seconds']:.0f} s.",
            "",
        ]
    if tiles := result.get("tiles"):
        lines += ["### Tiles of the grouped products", "", *tile_table(tiles)]
    for title, columns, mine in split(result["rows"]):
        lines += [f"### {title}", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        lines += [f"| {' | '.join(cells(row))} |" for row in mine]
        lines += ["", *out_of_reach(mine)]
    return "\n".join(lines)
