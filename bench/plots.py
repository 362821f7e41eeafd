"""Result rows as SVG text, by matplotlib: narrow figures with large type, so that a phone shows them whole."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable
from typing import Any

from .report import time_text

Row = dict[str, Any]

WIDTH = 4.2  # inches; a phone's width at a type size that is read without zooming
LABEL_LENGTH = 60  # characters that fit the width at the usual size
OURS, FASTER, SLOWER = "#0072b2", "#0072b2", "#d55e00"
# Okabe and Ito's colours, told apart by colour-blind readers as well.
PEER_COLOURS = ("#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")
MARKERS = ("s", "^", "D", "v", "P", "X", "*")
UNEVEN = ("zipf", "one_hot", "half_empty", "real")
SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "forward": "fwd", "forward+backward": "fwd+bwd"}


def row_label(row: Row) -> str:
    """What was timed, in one line."""
    parts = [] if row["table"] in ("A", "D", "scaling", "memory", "model") else [row["op"]]
    parts += [row["shape"], SHORT.get(row["dtype"], row["dtype"])]
    if not (parts[0] == row["op"] and row["op"].endswith("_backward")):
        parts.append(SHORT.get(row["direction"], row["direction"]))
    return " · ".join([*parts, *([row["routing"]] if row["routing"] in UNEVEN else [])])


def ratio_bars(rows: list[Row], ratio: str = "speedup_over_best_peer", of: str = "time") -> str:
    """One bar for each row with a peer: how many times ours the best peer's time (or what ``of`` names) is."""
    rows = [row for row in rows if row.get(ratio)]
    if not rows:
        return ""
    values = [row[ratio] for row in rows]

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        low, high = min([*values, 0.8]), max([*values, 1.25])
        for place, (row, value) in enumerate(zip(rows, values, strict=True)):
            axes.barh(place + 0.2, value - 1, left=1, height=0.42, color=FASTER if value >= 1 else SLOWER)
            axes.text(max(value, 1) * 1.03, place + 0.2, f"{value:.2f}x", va="center", fontsize=8)
            label = row_label(row)
            text = axes.text(0, place - 0.26, label, va="center", fontsize=min(8, 8 * LABEL_LENGTH / len(label)),
                             transform=axes.get_yaxis_transform(),
                             bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5})  # fmt: skip
            text.set_in_layout(False)
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set_xscale("log", base=2)
        axes.set_xlim(low / 1.1, high * 1.35)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_yticks([])
        powers = [2.0**p for p in range(math.floor(math.log2(low)), math.ceil(math.log2(high)) + 1)]
        _ticks(axes.xaxis, [p for p in powers if low / 1.1 <= p <= high * 1.35], lambda value: f"{value:g}x")
        axes.set_xlabel(f"{of} of the best peer / {of} of moe_ext")
        axes.spines[["top", "right", "left"]].set_visible(False)

    return _svg(draw, height=0.7 + 0.44 * len(rows), label=f"{of} of the best peer over ours")


def roofline(rows: list[Row], machine: dict[str, Any], dtype: str) -> str:
    """Reached FLOP/s against FLOPs per byte moved, under the bandwidth and the fastest product of the run."""
    points = []
    for row in rows:
        share, rate = row.get("percent_of_copy_bandwidth"), row.get("flops_per_second")
        if row["dtype"] == dtype and share and rate:
            moved = share / 100 * machine["copy_bytes_per_second"]
            points.append((row["op"], rate / moved, rate))
    if not points:
        return ""
    bandwidth = max(machine["copy_bytes_per_second"], machine.get("read_bytes_per_second") or 0)
    peak, peak_name = peak_flops(rows, machine, dtype)
    left = min(p[1] for p in points) / 2
    right = max([p[1] for p in points] + ([peak / bandwidth] if peak else [])) * 3

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        ridge = peak / bandwidth if peak else right
        axes.plot([left, min(ridge, right)], [left * bandwidth, min(ridge, right) * bandwidth], color="black",
                  label=f"bandwidth, {bandwidth / 1e9:.0f} GB/s")  # fmt: skip
        if peak:
            axes.plot([min(ridge, right), right], [peak, peak], color="black", linestyle="--",
                      label=f"{peak_name}, {peak / 1e9:.0f} GFLOP/s")  # fmt: skip
        for index, op in enumerate(dict.fromkeys(p[0] for p in points)):
            mine = [p for p in points if p[0] == op]
            axes.scatter([p[1] for p in mine], [p[2] for p in mine], s=22, label=op, zorder=3,
                         color=(OURS, *PEER_COLOURS)[index % 8], marker=("o", *MARKERS)[index % 8])  # fmt: skip
        axes.set(xscale="log", yscale="log", xlim=(left, right), xlabel="FLOPs per byte of least traffic",
                 ylabel="GFLOP/s")  # fmt: skip
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        _rates(axes, lambda value: f"{value / 1e9:g}")
        axes.grid(which="major", color="#dddddd")
        _legend(figure, axes)

    return _svg(draw, height=4.2, label=f"roofline, {dtype}")


def peak_flops(rows: list[Row], machine: dict[str, Any], dtype: str) -> tuple[float | None, str]:
    """The machine's rate of multiplication: measured as such where the file has it, else the fastest dense product."""
    measured = machine.get("peak_flops_per_second")
    if isinstance(measured, dict) and measured.get(dtype):
        return float(measured[dtype]), "peak"
    rates: dict[str, list[float]] = {}
    for row in rows:
        if row["dtype"] == dtype and row.get("flops_per_second"):
            for name, share in (row.get("percent_of_ceiling") or {}).items():
                rates.setdefault(name, []).append(row["flops_per_second"] * 100 / share)
    if not rates:
        return None, ""
    name = max(rates, key=lambda name: max(rates[name]))
    return max(rates[name]), f"fastest {name}"


def scaling_lines(rows: list[Row], axis: str, dtype: str, direction: str) -> str:
    """Time of every contender against ``axis`` (T, E or threads), where the rows of the scaling table vary it."""
    swept = [
        row for row in rows if row["table"] == "scaling" and (row["dtype"], row["direction"]) == (dtype, direction)
    ]
    sizes = [{**dict(re.findall(r"(\w+)=(\d+)", row["shape"]))} for row in swept]
    others: dict[tuple[tuple[str, str], ...], list[tuple[int, Row]]] = {}
    for row, size in zip(swept, sizes, strict=True):
        if axis in size:
            rest = tuple(sorted((k, v) for k, v in size.items() if k != axis))
            others.setdefault(rest, []).append((int(size[axis]), row))
    # The longest series; of equally long ones that of the most tokens.
    fixed, series = max(
        others.items(), key=lambda item: (len(item[1]), int(dict(item[0]).get("T", 0))), default=((), [])
    )
    if len(series) < 2:
        return ""
    series.sort(key=lambda point: point[0])
    # A peer keeps its colour in every drawing of the file.
    peers = sorted({name for row in rows if row["table"] == "scaling" for name in row["peer_seconds"]})
    names = ["moe_ext", *peers]

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        for index, name in enumerate(names):
            times = [(x, row["seconds"] if name == "moe_ext" else row["peer_seconds"].get(name)) for x, row in series]
            known = [(x, seconds) for x, seconds in times if seconds]
            if not known:
                continue
            ours = index == 0
            axes.plot(*zip(*known, strict=True), label=name, markersize=4.5, linewidth=2 if ours else 1.2,
                      color=OURS if ours else PEER_COLOURS[(index - 1) % 7],
                      marker="o" if ours else MARKERS[(index - 1) % 7])  # fmt: skip
        axes.set(xscale="log", yscale="log")
        _ticks(axes.xaxis, _apart([x for x, _ in series]), lambda value: f"{value:g}")
        _rates(axes, time_text)
        axes.set_xlabel({"T": "tokens", "E": "experts", "threads": "threads"}[axis])
        axes.set_ylabel(f"time of a layer, {SHORT[direction]}")
        axes.set_title(", ".join(f"{k}={v}" for k, v in fixed), fontsize=8)
        axes.grid(which="major", color="#dddddd")
        _legend(figure, axes)

    return _svg(draw, height=4.2, label=f"time against {axis}, {dtype}, {direction}")


def _apart(values: list[int]) -> list[int]:
    """Those of the ascending values that stand far enough apart on a logarithmic axis to be written there."""
    least = (values[-1] / values[0]) ** (1 / 7)
    shown = [values[0]]
    for value in values[1:]:
        if value >= shown[-1] * least:
            shown.append(value)
    return shown


def _ticks(axis: Any, values: list[float], text: Callable[[float], str]) -> None:
    axis.set_ticks(values, [text(value) for value in values])
    axis.set_ticks([], minor=True)


def _rates(axes: Any, text: Callable[[float], str]) -> None:
    """A logarithmic upright axis with a number at 1, 2 and 5 of each decade, of long ones at 1 only."""
    from matplotlib.ticker import LogLocator

    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 300 else (1,)))
    axes.yaxis.set_major_formatter(lambda value, _: text(value))
    axes.yaxis.set_minor_formatter("")


def _legend(figure: Any, axes: Any) -> None:
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8, frameon=False)


def _svg(draw: Callable[[Any], None], *, height: float, label: str) -> str:
    """The drawing as an <svg> element that takes the width it is given."""
    import matplotlib
    from matplotlib.figure import Figure

    settings = {"svg.fonttype": "path", "svg.hashsalt": label, "font.size": 9, "axes.labelsize": 9}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        draw(figure)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()[text.getvalue().index("<svg") :]
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
