"""The report is one whole page: everything in it, readable at any width, true to the results."""

import json
import lzma
import re
import shutil
import subprocess
from base64 import b64decode
from html import unescape
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import example_tied_dropout
import gradient_accounting
import layer_rewinding
import plot_results
from engine.config.load import load_configs
from engine.runs.provenance import REPOSITORY
from engine.runs.run import Run
from plotting.families import find_families
from plotting.figures import Drawing, figure_kinds
from plotting.report.html import _chapter, _figures, _runs_of
from tests.conftest import TINY

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
in_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian: chromium)")
# A phone and a laptop: each shows the page in a frame of its width, and says what it looks like.
WIDTHS = (360, 400, 1280)
PROBE = """<script>addEventListener("load", () => {
  const broken = [...document.images].filter(i => !i.complete || !i.naturalWidth).length;
  const cut = [...document.querySelectorAll("td, th, .scroll, small")]
    .filter(e => e.scrollWidth > e.clientWidth + 1 && e.clientWidth).length;
  const wide = document.documentElement.scrollWidth - innerWidth;
  parent.postMessage({width: innerWidth, images: document.images.length, broken, wide, cut}, "*");
});</script></body>"""
FRAMES = """<html><body><pre id="said"></pre>{frames}<script>
addEventListener("message", event => {{
  document.getElementById("said").textContent += JSON.stringify(event.data) + "\\n";
}});</script></body></html>"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A report of a plain run, rewound, and one with example-tied dropout."""
    place = tmp_path_factory.mktemp("report")
    config = place / "tiny.yaml"
    config.write_text(TINY + f"output_dir: {place / 'runs'}\nrewinding: {{epochs: [0, 1, 2]}}\n")
    (plain,) = load_configs(config)
    gradient_accounting.EXPERIMENT.main(Run.of(plain))
    layer_rewinding.EXPERIMENT.main(Run.of(plain))
    dropout = ["dropout.kind=example_tied", "model.width=0.1", "dropout.forget_draws=1"]
    (tied,) = load_configs(config, dropout)
    example_tied_dropout.EXPERIMENT.main(Run.of(example_tied_dropout.without_accounting(tied)))
    assert plot_results.main([str(place / "runs"), "--format", "png"]) == 0
    return place / "runs"


@pytest.fixture
def page(folder) -> str:
    return (folder / "report.html").read_text(encoding="utf-8")


def run_chromium(*arguments: str) -> subprocess.CompletedProcess:
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    return subprocess.run(
        [*command, "--enable-logging=stderr", *arguments],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip


def test_nothing_in_it_comes_from_elsewhere(page):
    sources = re.findall(r"""(?:src|href)=["']([^"']*)""", page)
    assert sources
    assert all(source.startswith(("data:image/png;base64,", "#")) for source in sources)
    assert "@import" not in page
    assert "url(" not in page
    assert "<script" not in page


def test_every_link_leads_somewhere(page):
    anchors = set(re.findall(r'href="#([^"]+)"', page))
    assert anchors <= set(re.findall(r'id="([^"]+)"', page))
    assert {"gradients", "rewinding", "retraining", "flipping", "dropout"} <= anchors


def test_it_says_what_the_summary_says(folder, page):
    summary = json.loads((folder / "summary.json").read_text())
    rows = re.findall(r'class="verdict \w+">([^<]*)</td></tr>', page)
    assert sorted(map(unescape, rows)) == sorted(c["verdict"] for c in summary["claims"])
    measured = {c["claim"] for c in summary["claims"] if c["n"]}
    assert {"gradients.norm_ratio_epochs", "rewinding.not_last", "dropout.after_noisy"} <= measured
    assert "layer_retraining.py" in page, "the command for what is missing"


def test_the_summary_is_the_same_for_the_same_results(folder):
    before = (folder / "summary.json").read_bytes()
    assert plot_results.main([str(folder), "--format", "png"]) == 0
    assert (folder / "summary.json").read_bytes() == before


def test_results_can_be_kept_apart_from_their_runs(folder, tmp_path, capsys):
    before = {path for path in folder.rglob("*") if path.is_file()}
    kept = tmp_path / "kept"
    assert plot_results.main([str(folder), "--output", str(kept), "--format", "png"]) == 0
    assert {path for path in folder.rglob("*") if path.is_file()} == before
    sources = json.loads((kept / "provenance.json").read_text())
    assert len(sources) == 2
    for place, source in sources.items():
        paths = sorted((kept / place).iterdir())
        run = folder / Path(place).parent.name / Path(place).name
        tables = [path.name.removesuffix(".xz") for path in paths]
        assert tables == sorted(path.name for path in run.glob("*.csv"))
        for path, name in zip(paths, tables):
            opened = lzma.open if path.suffix == ".xz" else open
            with opened(path, "rt") as file:
                assert file.read() == (run / name).read_text()
        packed = [path.name for path in paths if path.suffix == ".xz"]
        assert packed == sorted(source.get("sha256", {}))
        assert source["versions"]["torch"]
        assert source["settings"]["data.name"] == "glyphs"
        assert str(tmp_path.parent) not in json.dumps(source), "no path of this machine"
    assert (kept / "summary.json").read_bytes() == (folder / "summary.json").read_bytes()
    assert list((kept / "figures").glob("*/gradient_norms.png"))


def test_each_chapter_names_the_runs_that_its_script_measures(folder):
    families = find_families([folder])
    of = {family.config.dropout.kind: family.runs[0].directory for family in families}
    plain, tied = of["none"], of["example_tied"]
    assert _runs_of("rewinding", families) == [plain]
    assert _runs_of("dropout", families) == [tied]
    assert _runs_of("planted", families) == []
    table = tied / "planted_memorization.csv"
    table.write_text("")
    assert _runs_of("planted", families) == [tied]
    table.unlink()


def test_it_lists_every_deviation_of_the_docs(page):
    text = (REPOSITORY / "docs" / "deviations.md").read_text(encoding="utf-8")
    titles = re.findall(r"^[0-9]+[.] [*][*](.+?)[*][*]", text, re.MULTILINE)
    _, _, section = page.partition('id="deviations"')
    assert re.findall(r"<li><b>(.+?)</b>", section) == titles
    assert len(titles) >= 16


def test_text_has_the_same_size_on_every_figure(folder, page):
    """A figure's share of the page is its width in inches: letters have the same points on all."""
    shares = {}
    for alt, share, data in re.findall(
        r'alt="([^"]*)" style="width: ([\d.]+)%" src="data:image/png;base64,([^"]*)"', page
    ):
        shares.setdefault(alt, set()).add(Image.open(BytesIO(b64decode(data))).width / float(share))
    ratios = [ratio for found in shares.values() for ratio in found]
    assert len(ratios) >= 5
    assert max(ratios) == pytest.approx(min(ratios), rel=0.01)


def test_a_chapter_without_claims_does_not_deny_its_figures(tmp_path):
    content = tmp_path / "roc.png"
    Image.new("RGB", (660, 400)).save(content)
    (kind,) = (kind for kind in figure_kinds() if kind.name == "roc")
    denial = "No run of this kind."
    assert denial not in _chapter("scores", [], [], [Drawing(kind, "a run", (content,))])
    assert denial in _chapter("scores", [], [], [])
    assert denial in _chapter("gradients", [], [], [])


def test_a_figure_that_is_no_png_is_named():
    (kind,) = (kind for kind in figure_kinds() if kind.name == "roc")
    assert "runs/figures/roc.pdf" in _figures(
        [Drawing(kind, "a run", (Path("runs/figures/roc.pdf"),))]
    )


def test_figures_of_single_families_are_folded_where_there_are_many(tmp_path):
    content = tmp_path / "figure.png"
    Image.new("RGB", (660, 400)).save(content)
    kinds = {bool(kind.compares): kind for kind in figure_kinds()}
    drawings = [Drawing(kinds[False], f"run {i}", (content,)) for i in range(3)]
    together = Drawing(kinds[True], "all", (content,))
    folded = _figures([*drawings, together])
    assert folded.count("<details>") == 3
    assert folded.index("<small>all</small>") < folded.index("<details>")
    assert "<details>" not in _figures(drawings[:2])


@in_browser
def test_a_browser_shows_it_whole(folder, page, tmp_path):
    (tmp_path / "probe.html").write_text(page.replace("</body>", PROBE), encoding="utf-8")
    frames = "".join(
        f'<iframe src="probe.html" width="{width}" height="900"></iframe>' for width in WIDTHS
    )
    (tmp_path / "frames.html").write_text(FRAMES.format(frames=frames), encoding="utf-8")
    shown = run_chromium("--virtual-time-budget=20000", "--dump-dom",
                         f"file://{tmp_path / 'frames.html'}")  # fmt: skip
    said = re.search(r'<pre id="said">(.*?)</pre>', shown.stdout, re.DOTALL).group(1)
    found = {entry["width"]: entry for entry in map(json.loads, said.strip().splitlines())}
    assert set(found) == set(WIDTHS)
    for entry in found.values():
        assert entry["images"] == page.count("<img ") >= 8
        assert entry["broken"] == 0
        assert entry["wide"] <= 0, f"cut off by {entry['wide']} pixels"
        assert entry["cut"] == 0, "cells are wider than their columns"
    assert "CONSOLE" not in shown.stderr


@in_browser
@pytest.mark.parametrize("width", [500, 1280])
def test_a_screenshot_is_not_cut_off(folder, tmp_path, width):
    path = tmp_path / "page.png"
    run_chromium(f"--window-size={width},4000", f"--screenshot={path}",
                 f"file://{folder / 'report.html'}")  # fmt: skip
    pixels = np.asarray(Image.open(path).convert("L"))
    assert pixels.shape == (4000, width)
    assert pixels.std() > 5, "an empty page"
    assert (pixels[:, -8:] > 250).all(), "something reaches the right edge"
