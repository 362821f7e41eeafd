"""The few figures of a README, from result files: layers and decode against the best peer, and what a peer wins."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from .report import machine_text, time_text

BEGIN, END = "<!-- made by python -m bench headline -->\n", "<!-- end -->\n"
# The runs whose tables A and D have the layers of published models.
PROFILES = ("cpu-full", "gpu")
DIRECTIONS = ("forward", "forward+backward")


def headline(paths: list[Path]) -> str:
    """Markdown: a line for each layer, its time and the best peer's over it."""
    results = [json.loads(path.read_text()) for path in paths]
    chosen = [r for r in results if r["profile"] in PROFILES and any(row["table"] == "A" for row in r["rows"])]
    dtypes = list(dict.fromkeys(row["dtype"] for r in sorted(chosen, key=dtype_order) for row in r["rows"]))
    columns = [(dtype, direction) for dtype in dtypes for direction in DIRECTIONS]
    lines = [
        "| layer | " + " | ".join(f"{dtype} {direction}" for dtype, direction in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    found: dict[str, dict[tuple[str, str], dict[str, Any]]] = {}
    for row in (row for r in chosen for row in r["rows"]):
        if row["op"] in ("moe_mlp", "moe_mlp_backward") and row["table"] in "AD" and row["routing"] == "uniform":
            found.setdefault(row["shape"], {})[row["dtype"], row["direction"]] = row
    for shape in sorted(found, key=tokens_of, reverse=True):
        cells = (cell(found[shape].get(column)) for column in columns)
        lines.append(f"| {shape} | " + " | ".join(cells) + " |")
    machines = dict.fromkeys(f"{machine_text(r['machine'])}; `{r['command']}`" for r in chosen)
    return "\n".join([*lines, "", slower_text(results), "", *(f"- {text}" for text in machines), ""])


def dtype_order(result: dict[str, Any]) -> bool:
    return result["rows"][0]["dtype"] != "float32"


def tokens_of(shape: str) -> int:
    return int(shape.rpartition("T=")[2])


def cell(row: dict[str, Any] | None) -> str:
    if row is None or not row["best_peer"]:
        return "-"
    return f"{time_text(row['seconds'])}, {row['speedup_over_best_peer']:.2f}x"


def slower_text(results: list[dict[str, Any]]) -> str:
    """How many rows of all files a peer wins, and the widest margin of each op."""
    rows = [row for r in results for row in r["rows"] if row.get("speedup_over_best_peer")]
    worst: dict[str, float] = {}
    slower = [row for row in rows if row["speedup_over_best_peer"] < 1]
    for row in slower:
        worst[row["op"]] = min(row["speedup_over_best_peer"], worst.get(row["op"], 1.0))
    text = ", ".join(f"`{op}` {ratio:.2f}x" for op, ratio in sorted(worst.items(), key=lambda item: item[1]))
    counted = f"Of {len(rows)} timings in all files the best peer is faster in {len(slower)}"
    return f"{counted}; at worst {text}." if slower else f"{counted}."


def write_into(page: Path, text: str) -> None:
    """Puts the figures between the two marks of a page."""
    before, begin, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise SystemExit(f"{page}: expected the lines {BEGIN.strip()!r} and {END.strip()!r}, found none")
    page.write_text(before + begin + text + end + after)


def read_from(page: Path) -> str:
    """What stands between the marks."""
    match = re.search(re.escape(BEGIN) + "(.*?)" + re.escape(END), page.read_text(), re.DOTALL)
    return match[1] if match else ""
