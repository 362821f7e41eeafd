"""Two result files against each other: which rows became slower, by the samples that both hold."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

from .report import SCHEMA_VERSION, bytes_text, time_text

KEY = ("op", "table", "shape", "dtype", "routing", "direction")
MACHINE = ("cpu", "gpu", "threads", "torch")


class Change(NamedTuple):
    """One row of both files; ``ratio`` is new over old, so above 1 is worse."""

    key: tuple[str, ...]
    old: float
    new: float
    ratio: float
    p_value: float | None  # None: memory, which is counted, not sampled
    verdict: str  # slower, faster, same, unsure


def compare(old: dict[str, Any], new: dict[str, Any], threshold: float, alpha: float) -> list[Change]:
    """Rows of both results. Slower: the median is more than ``threshold`` above the old one, and by a one-sided
    Mann-Whitney test of the samples chance gives that no more often than ``alpha``; unsure: only the former."""
    before = {tuple(row[k] for k in KEY): row for row in old["rows"]}
    changes = []
    for row in new["rows"]:
        key = tuple(row[k] for k in KEY)
        if key in before:
            changes.append(_change(key, before[key], row, threshold, alpha))
    return changes


def _change(key: tuple[str, ...], old: dict[str, Any], new: dict[str, Any], threshold: float, alpha: float) -> Change:
    if "peak_bytes" in new:
        ratio = new["peak_bytes"] / max(old["peak_bytes"], 1)
        verdict = "slower" if ratio > 1 + threshold else "faster" if ratio < 1 / (1 + threshold) else "same"
        return Change(key, old["peak_bytes"], new["peak_bytes"], ratio, None, verdict)
    from scipy.stats import mannwhitneyu

    ratio = new["seconds"] / old["seconds"]
    worse = ratio > 1
    p_value = float(
        mannwhitneyu(new["samples"]["ours"], old["samples"]["ours"], alternative="greater" if worse else "less").pvalue
    )
    if 1 / (1 + threshold) <= ratio <= 1 + threshold:
        verdict = "same"
    elif p_value > alpha + 1e-9:
        verdict = "unsure"
    else:
        verdict = "slower" if worse else "faster"
    return Change(key, old["seconds"], new["seconds"], ratio, p_value, verdict)


def read(path: Path) -> dict[str, Any]:
    """A result file with samples; raises SystemExit for one that has none."""
    result: dict[str, Any] = json.loads(path.read_text())
    if result["schema_version"] < SCHEMA_VERSION:
        raise SystemExit(
            f"{path}: expected schema_version {SCHEMA_VERSION}, got {result['schema_version']}: it holds no samples; "
            "measure again"
        )
    return result


def print_changes(changes: list[Change], everything: bool) -> None:
    """A table of what changed, the worst first, and one line of counts."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 150)
    table = Table("row", "old", "new", "new/old", "p", "verdict")
    shown = changes if everything else [c for c in changes if c.verdict != "same"]
    for change in sorted(shown, key=lambda c: -c.ratio):
        op, _, shape, dtype, routing, direction = change.key
        text = bytes_text if change.p_value is None else time_text
        table.add_row(f"{op} {shape} {dtype} {routing} {direction}", text(change.old), text(change.new),
                      f"{change.ratio:.2f}", "" if change.p_value is None else f"{change.p_value:.2g}",
                      change.verdict)  # fmt: skip
    if shown:
        console.print(table)
    counts = {verdict: sum(c.verdict == verdict for c in changes) for verdict in ("slower", "unsure", "same", "faster")}
    console.print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))


def main(old_path: Path, new_path: Path, threshold: float, alpha: float, everything: bool) -> int:
    """The exit status: 0, or 1 where a row is slower, or 2 where the files have no row in common."""
    try:
        import scipy  # noqa: F401
    except ImportError:
        raise SystemExit("the comparison tests significance with scipy. Run: pip install 'moe_ext[bench]'") from None
    old, new = read(old_path), read(new_path)
    for name in MACHINE:
        if old["machine"].get(name) != new["machine"].get(name):
            before, after = old["machine"].get(name), new["machine"].get(name)
            print(f"warning: measured on another {name}: {before}, then {after}", file=sys.stderr)
    changes = compare(old, new, threshold, alpha)
    if not changes:
        print("the files have no row in common", file=sys.stderr)
        return 2
    if left_out := len(old["rows"]) - len(changes):
        print(f"{left_out} rows of {old_path} are not in {new_path}", file=sys.stderr)
    print_changes(changes, everything)
    return int(any(change.verdict == "slower" for change in changes))
