"""Result files as one HTML page that needs nothing else: styles and drawings are inside, no script, no network."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

from . import plots, report

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.45 system-ui, sans-serif; margin: 0 auto; max-width: 76rem; padding: 0 1rem 3rem; color: #1a1a1a; }
h1 { font-size: 1.6rem; } h2 { border-top: 2px solid #0072b2; padding-top: .6rem; margin-top: 2.5rem; }
h2, p, code { overflow-wrap: anywhere; }
.drawings { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1.2rem; }
figure { margin: 0; min-width: 0; } figure svg { display: block; width: 100%; height: auto; max-width: 36rem; }
figcaption { font-weight: 600; margin-bottom: .3rem; }
.table { overflow-x: auto; } table { border-collapse: collapse; font-size: .85rem; white-space: nowrap; }
th, td { padding: .25rem .6rem; text-align: left; border-bottom: 1px solid #ddd; }
td:nth-child(n+6) { text-align: right; font-variant-numeric: tabular-nums; } th { background: #f2f6f9; }
summary { cursor: pointer; padding: .4rem 0; font-weight: 600; }
"""


def page(paths: list[Path]) -> str:
    """The page; raises SystemExit where matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise SystemExit("the page is drawn with matplotlib. Run: pip install 'moe_ext[bench]'") from None
    results = [json.loads(path.read_text()) for path in paths]
    sections = [section(path.name, result) for path, result in zip(paths, results, strict=True)]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><title>moe_ext benchmark</title>'
        f"<style>{STYLE}</style></head><body><h1>moe_ext benchmark</h1>"
        f"<p>{html.escape(report.explanation(results).replace('`', ''))}</p>" + "\n".join(sections) + "</body></html>\n"
    )


def section(name: str, result: dict[str, Any]) -> str:
    """One result file."""
    rows, machine = result["rows"], result["machine"]
    lines = [f"<h2>{html.escape(name)}</h2>", f"<p>{html.escape(report.machine_text(machine))}<br>",
             f"<code>{html.escape(result['command'])}</code></p>"]  # fmt: skip
    if note := result.get("note"):
        lines.append(f"<p>{html.escape(note)}</p>")
    lines.append('<div class="drawings">')
    timed = [row for row in rows if row["table"] != "memory"]
    dtypes = list(dict.fromkeys(row["dtype"] for row in timed))
    for dtype in dtypes:
        lines.append(_figure(f"Roofline, {dtype}", plots.roofline(timed, machine, dtype)))
    for title, _, mine in report.split([row for row in timed if row["table"] != "scaling"]):
        lines.append(_figure(f"{title}: speedup", plots.ratio_bars(mine)))
    memory = [row for row in rows if row["table"] == "memory"]
    lines.append(
        _figure("Peak memory: the best peer over ours", plots.ratio_bars(memory, "best_peer_over_ours", "peak"))
    )
    for axis, word in (("T", "tokens"), ("E", "experts"), ("threads", "threads")):
        for dtype in dtypes:
            for direction in ("forward", "forward+backward"):
                drawing = plots.scaling_lines(timed, axis, dtype, direction)
                lines.append(_figure(f"Time against {word}, {dtype}, {direction}", drawing))
    lines.append("</div>")
    lines += [_table(*split) for split in report.split(rows)]
    if tiles := result.get("tiles"):
        lines += ["<h3>Tiles of the grouped products</h3>", f"<p>{html.escape(report.tile_summary(tiles))}</p>"]
    return "\n".join(line for line in lines if line)


def _figure(caption: str, svg: str) -> str:
    return f"<figure><figcaption>{html.escape(caption)}</figcaption>{svg}</figure>" if svg else ""


def _table(title: str, columns: tuple[str, ...], rows: list[dict[str, Any]]) -> str:
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in report.cells(row)) + "</tr>" for row in rows
    )
    return (f"<details><summary>{html.escape(title)}: {len(rows)} rows</summary>"
            f'<div class="table"><table><tr>{head}</tr>{body}</table></div></details>')  # fmt: skip
