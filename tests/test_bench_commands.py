"""What the benchmark does with its results: the schema, Markdown and HTML, the comparison, the layers of a model."""

from __future__ import annotations

import html
import json
import random
import re
import shutil
import subprocess
from itertools import combinations
from pathlib import Path

import pytest
import torch

from bench import __main__ as bench
from bench import compare, html_report, model_layers, plots
from bench.shapes import LayerShape

ROOT = Path(__file__).resolve().parent.parent
RESULTS = sorted((ROOT / "bench/results").glob("*.json"))
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> Path:
    """Tables A, D and scaling of the tiny layers."""
    torch.use_deterministic_algorithms(False)
    arguments = ["--profile", "quick", "--tables", "A,D,scaling", "--ops", "moe_mlp", "--rounds", "3"]
    return bench.run(bench.parse(["run", *arguments, "--out", str(tmp_path_factory.mktemp("out"))]))


def wide_result(path: Path) -> Path:
    """The committed results with a scaling table of the size that a full run has: made-up times, real labels."""
    result = json.loads((ROOT / "bench/results/cpu-2-threads.json").read_text())
    peers = {"torch grouped_mm": 1.4, "transformers eager": 2.0, "transformers grouped_mm": 1.5}
    for direction, factor in (("forward", 1.0), ("forward+backward", 3.3)):
        points = [(t, 64, 2) for t in (1, 4, 16, 64, 256, 1024, 4096, 8192)]
        points += [(1024, e, 2) for e in (8, 16, 32, 128, 256, 512)] + [(1024, 64, 1)]
        for tokens, experts, threads in points:
            seconds = factor * (1e-4 + tokens * 6e-5) * (1 + experts / 500) * 2 / threads
            result["rows"].append({
                "op": "moe_mlp", "table": "scaling", "dtype": "float32", "routing": "uniform", "direction": direction,
                "shape": f"H=512 I=256 K=8 E={experts} T={tokens} threads={threads}", "seconds": seconds,
                "peer_seconds": {name: seconds * times for name, times in peers.items()}, "best_peer": "torch grouped_mm",
                "speedup_over_best_peer": 1.4, "percent_of_copy_bandwidth": None, "percent_of_ceiling": {},
            })  # fmt: skip
    path.write_text(json.dumps(result))
    return path


def test_results_keep_to_the_schema(measured):
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed (requirements/dev.txt)")
    schema = json.loads((ROOT / "bench/schema.json").read_text())
    validator = jsonschema.Draft202012Validator(schema)
    validator.check_schema(schema)
    for path in (measured, *RESULTS):
        validator.validate(json.loads(path.read_text()))
    data = json.loads(measured.read_text())
    described = set()
    for part in (schema["properties"]["rows"]["items"], schema["properties"]["rows"]["items"]["else"]):
        described |= set(part["properties"])
    assert {key for row in data["rows"] for key in row} <= described
    data["rows"][0]["samples"]["ours"][0] = -1
    with pytest.raises(jsonschema.ValidationError, match="less than or equal to the minimum of 0"):
        validator.validate(data)


def test_samples_are_the_rounds(measured):
    for row in json.loads(measured.read_text())["rows"]:
        assert set(row["samples"]) == {"ours", *row["peer_seconds"]}
        ours = sorted(row["samples"]["ours"])
        assert len(ours) == row["rounds"] >= 3
        assert ours[0] == pytest.approx(row["best_seconds"], rel=1e-3)
    assert "\n   " not in re.search(r'"ours": \[([^\]]*)\]', measured.read_text())[1]


def test_peers_and_backend_are_filters(tmp_path):
    arguments = ["--profile", "quick", "--tables", "D", "--backend", "cpu", "--rounds", "3", "--out", str(tmp_path)]
    rows = json.loads(bench.run(bench.parse([*arguments, "--peers", "torch"])).read_text())["rows"]
    assert rows and all(set(row["peer_seconds"]) == {"torch grouped_mm"} for row in rows)
    rows = json.loads(bench.run(bench.parse([*arguments, "--peers", "none"])).read_text())["rows"]
    assert rows and all(row["best_peer"] is None and row["peer_seconds"] == {} for row in rows)


def test_without_a_command_it_runs():
    assert bench.parse(["--rounds", "2"]).subcommand == bench.parse([]).subcommand == "run"
    assert bench.parse(["report", "x.json"]).files == [Path("x.json")]
    with pytest.raises(SystemExit):
        bench.parse(["report"])


def test_page_needs_nothing_else(measured, tmp_path):
    page = tmp_path / "page.html"
    bench.main(["report", str(measured), str(wide_result(tmp_path / "wide.json")), "--html", str(page)])
    text = page.read_text()
    assert "<script" not in text and "@import" not in text and "url(http" not in text
    assert not [link for link in re.findall(r'(?:src|href)="([^"]*)"', text) if not link.startswith("#")]
    for caption in ("Roofline, float32", "A: Layers: speedup", "Time against tokens, float32, forward",
                    "Time against experts", "Time against threads"):  # fmt: skip
        assert caption in text
    assert text.count("<svg") >= 10 and "moe_mlp" in text and "150 rows" not in text


def drawings(monkeypatch, result: dict) -> dict[str, object]:
    """Every figure of a result file, laid out but not written."""
    from matplotlib.figure import Figure

    figures = {}

    def keep(draw, *, height: float, label: str) -> str:
        import matplotlib

        with matplotlib.rc_context({"font.size": 9, "axes.labelsize": 9}):
            figure = Figure(figsize=(plots.WIDTH, height), layout="constrained")
            draw(figure)
            figure.draw_without_rendering()
        figures[f"{label} {len(figures)}"] = figure
        return "<svg>"

    monkeypatch.setattr(plots, "_svg", keep)
    html_report.section("x.json", result)
    return figures


def outside(axis) -> list[object]:
    """The labels of ticks beyond the limits: laid out somewhere, not drawn."""
    low, high = sorted(axis.get_view_interval())
    beyond = [tick for tick in axis.get_major_ticks() if not low <= tick.get_loc() <= high]
    return [label for tick in beyond for label in (tick.label1, tick.label2)]


def test_every_contender_of_the_scaling_table_is_drawn(monkeypatch):
    result = json.loads((ROOT / "bench/results/cpu-2-threads-scaling.json").read_text())
    figures = drawings(monkeypatch, result)
    lines = [
        line for label, figure in figures.items() if label.startswith("time against") for line in figure.axes[0].lines
    ]
    timed = {name for row in result["rows"] for name in row["peer_seconds"]}
    assert timed and {line.get_label() for line in lines} == {"moe_ext", *timed}


@pytest.mark.parametrize("name", ["wide.json", *(path.name for path in RESULTS)])
def test_no_text_of_a_drawing_is_cut_or_overlaps(name, monkeypatch, tmp_path):
    from matplotlib.text import Text

    path = wide_result(tmp_path / name) if name == "wide.json" else ROOT / "bench/results" / name
    figures = drawings(monkeypatch, json.loads(path.read_text()))
    assert len(figures) >= (10 if name == "wide.json" else 1)
    colours: dict[str, str] = {}
    for name, figure in figures.items():
        width, height = figure.bbox.size
        undrawn = {text for axes in figure.axes for axis in (axes.xaxis, axes.yaxis) for text in outside(axis)}
        texts = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip() and t not in undrawn]
        boxes = [(t.get_text(), t.get_window_extent()) for t in texts]
        for text, box in boxes:
            assert box.x0 >= -1 and box.x1 <= width + 1 and box.y0 >= -1 and box.y1 <= height + 1, (name, text)
        for (first, a), (second, b) in combinations(boxes, 2):
            apart = a.x1 <= b.x0 + 1 or b.x1 <= a.x0 + 1 or a.y1 <= b.y0 + 1 or b.y1 <= a.y0 + 1
            assert apart, f"{name}: {first!r} lies on {second!r}"
        for axes in figure.axes:
            assert axes.get_xlabel() and (axes.get_ylabel() or not axes.get_yticks().size), name
            for line in axes.lines if name.startswith("time against") else ():
                assert colours.setdefault(line.get_label(), line.get_color()) == line.get_color(), name
    assert len(set(colours.values())) == len(colours)


MEASURE = """<script>
const drawn = [...document.querySelectorAll("figure svg")].map(s => s.getBoundingClientRect());
parent.document.body.dataset.found = JSON.stringify({
  inner: innerWidth, scroll: document.documentElement.scrollWidth, count: drawn.length,
  narrowest: Math.min(...drawn.map(b => b.width)), right: Math.max(...drawn.map(b => b.right)),
  low: Math.min(...drawn.map(b => b.height))});
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")
@pytest.mark.parametrize("width", [390, 1280])
def test_page_in_a_browser(width, tmp_path):
    """At a phone's and a desktop's width: nothing sticks out, drawings are as large as their type needs.

    In a frame of that width, since a window is never narrower than 500 pixels.
    """
    text = html_report.page([wide_result(tmp_path / "wide.json")]).replace("</body>", MEASURE + "</body>")
    frame = f'<iframe style="border: 0" width="{width}" height="2000" srcdoc="{html.escape(text)}"></iframe>'
    page, shot = tmp_path / "page.html", tmp_path / "shot.png"
    page.write_text(f'<!doctype html><body style="margin: 0">{frame}</body>')
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1280,2000"]
    options += [f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={shot}", "--dump-dom"]
    run = subprocess.run([CHROMIUM, *options, page.as_uri()], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(re.search(r'data-found="([^"]*)"', run.stdout)[1].replace("&quot;", '"'))
    assert found["inner"] == width and found["scroll"] <= width and found["right"] <= width
    # Labels are 8 points of a drawing that is 4.2 inches wide: 9 pixels on a phone.
    assert found["count"] >= 10 and 8 * found["narrowest"] / (72 * plots.WIDTH) >= 9 and found["low"] > 80
    if shot.exists():
        image = pytest.importorskip("PIL.Image").open(shot)
        assert len(image.crop((0, 0, width, 2000)).convert("L").getcolors()) > 50  # not a blank page


# ---- compare


def result_of(seconds: list[float], **machine) -> dict:
    row = {"op": "moe_mlp", "table": "A", "shape": "s", "dtype": "float32", "routing": "uniform",
           "direction": "forward", "seconds": sorted(seconds)[len(seconds) // 2], "samples": {"ours": seconds}}  # fmt: skip
    return {"schema_version": 2, "machine": {"cpu": "c", "threads": 2, "torch": "1", **machine}, "rows": [row]}


def noisy(median: float, spread: float, count: int = 15, seed: int = 0) -> list[float]:
    generator = random.Random(seed)
    return [median * (1 + spread * generator.uniform(-1, 1)) for _ in range(count)]


@pytest.mark.parametrize(
    "old, new, verdict",
    [
        (noisy(1, 0.03), noisy(1.2, 0.03, seed=1), "slower"),
        (noisy(1, 0.03), noisy(0.8, 0.03, seed=1), "faster"),
        (noisy(1, 0.03), noisy(1.02, 0.03, seed=1), "same"),
        ([1.0, 1.4, 0.8, 1.2, 0.9], [1.1, 1.3, 0.85, 1.5, 1.2], "unsure"),
        ([1.0, 1.01, 1.02], [1.2, 1.21, 1.22], "slower"),
        ([1.0, 1.01, 1.3], [1.2, 1.21, 1.22], "unsure"),
    ],
)
def test_compare(old, new, verdict, tmp_path, capsys):
    pytest.importorskip("scipy", reason="scipy is not installed")
    paths = [tmp_path / "old.json", tmp_path / "new.json"]
    for path, samples in zip(paths, (old, new), strict=True):
        path.write_text(json.dumps(result_of(samples)))
    (change,) = compare.compare(*(json.loads(p.read_text()) for p in paths), threshold=0.05, alpha=0.05)
    assert change.verdict == verdict and change.ratio == pytest.approx(change.new / change.old)
    with pytest.raises(SystemExit) as status:
        bench.main(["compare", *map(str, paths)])
    assert status.value.code == int(verdict == "slower")
    assert f"1 {verdict}" in capsys.readouterr().out


def test_compare_threshold_and_memory():
    pytest.importorskip("scipy", reason="scipy is not installed")
    old, new = result_of(noisy(1, 0.01)), result_of(noisy(1.2, 0.01))
    assert compare.compare(old, new, threshold=0.3, alpha=0.05)[0].verdict == "same"
    for result, peak in ((old, 100), (new, 120)):
        result["rows"][0] |= {"table": "memory", "peak_bytes": peak}
    assert compare.compare(old, new, threshold=0.05, alpha=0.05)[0].verdict == "slower"


def test_compare_says_what_cannot_be_compared(tmp_path, capsys):
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text(json.dumps(result_of([1.0, 1.0, 1.0])))
    new.write_text(json.dumps(result_of([1.0, 1.0, 1.0], cpu="another")))
    assert compare.main(old, new, 0.05, 0.05, False) == 0
    assert "measured on another cpu: c, then another" in capsys.readouterr().err
    other = result_of([1.0, 1.0, 1.0])
    other["rows"][0]["shape"] = "t"
    new.write_text(json.dumps(other))
    assert compare.main(old, new, 0.05, 0.05, False) == 2
    old.write_text(json.dumps({**result_of([1.0]), "schema_version": 1}))
    with pytest.raises(SystemExit, match="expected schema_version 2, got 1"):
        compare.main(old, new, 0.05, 0.05, False)


# ---- shapes


@pytest.mark.parametrize(
    "model_type, sizes, num_layers",
    [
        ("mixtral", (4096, 14336, 8, 2), 32),
        ("olmoe", (2048, 2048, 64, 8), 16),
        ("qwen3_moe", (2048, 768, 128, 8), 24),
        ("deepseek_v3", (7168, 2048, 256, 8), 58),
        ("gpt_oss", (2880, 2880, 128, 4), 36),
        ("jamba", (4096, 14336, 16, 2), 16),
        ("ernie4_5_moe", (2560, 1536, 64, 6), 27),
        ("lfm2_moe", (2048, 1792, 32, 4), 30),
        ("llama4", (5120, 8192, 16, 1), 48),
        ("longcat_flash", (6144, 2048, 512, 12), 28),
    ],
)
def test_sizes_of_a_model(model_type, sizes, num_layers, tmp_path):
    """As transformers writes the configuration that it has for the model."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    transformers.CONFIG_MAPPING[model_type]().to_json_file(tmp_path / "config.json", use_diff=False)
    layers = model_layers.read_config(tmp_path)
    assert layers.shape[2:6] == sizes and layers.num_layers == num_layers
    assert layers.shape.gpt_oss == (model_type == "gpt_oss")


def test_sparse_step_and_mlp_only_layers():
    config = {"hidden_size": 8, "moe_intermediate_size": 4, "num_experts": 4, "num_experts_per_tok": 2,
              "num_hidden_layers": 8, "decoder_sparse_step": 2, "mlp_only_layers": [3]}  # fmt: skip
    assert model_layers.from_config(config, "x").num_layers == 3
    assert model_layers.from_config({"text_config": config}, "x").num_layers == 3
    with pytest.raises(SystemExit, match="expected one of hidden_size, d_model, n_embd with a number, found none"):
        model_layers.from_config({**config, "hidden_size": None}, "x")


def test_shapes_measures_the_layers(tmp_path, capsys):
    config = {"model_type": "small", "hidden_size": 32, "moe_intermediate_size": 16, "num_experts": 6,
              "num_experts_per_tok": 2, "num_hidden_layers": 5, "first_k_dense_replace": 1}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    bench.main(["shapes", str(tmp_path), "--tokens", "1", "4", "--dtype", "float32", "--backward", "--rounds", "3",
                "--backend", "cpu", "--peers", "torch", "--out", str(tmp_path)])  # fmt: skip
    output = capsys.readouterr().out
    assert "small: 4 layers with experts, H=32 I=16 E=6 K=2" in output and "per token" in output
    rows = json.loads((tmp_path / "small-cpu.json").read_text())["rows"]
    assert [(row["shape"], row["direction"]) for row in rows] == [
        ("small T=1", "forward"), ("small T=1", "forward+backward"), ("small T=4", "forward"),
        ("small T=4", "forward+backward"),
    ]  # fmt: skip
    for row in rows:
        assert row["model_seconds_per_token"] == pytest.approx(4 * row["seconds"] / int(row["shape"][-1]))


def test_a_layer_that_does_not_fit_is_refused():
    huge = LayerShape("huge", 1, 2**20, 2**16, 256, 8)
    with pytest.raises(SystemExit, match=r"huge: a layer in float32 needs about .* GB are free"):
        model_layers.check_memory(huge, torch.float32, "cpu", backward=False)
