"""Figures show what the paper's figures show, and every line that was measured."""

import numpy as np
import pytest
from matplotlib import pyplot as plt
from matplotlib.image import AxesImage

import plot_results
from data import DataError
from engine.config.load import load_configs
from engine.errors import UserError
from engine.runs import files
from engine.runs.run import Run
from engine.runs.tables import HISTORY
from gradient_accounting import ACCOUNTS
from layer_retraining import RETRAINING
from layer_rewinding import REWINDING
from neuron_flipping import FLIPPING
from plotting import gradients, layers
from plotting.families import Family, plotting_overrides
from plotting.figure_kind import FigureKind
from plotting.figures import cut_into_pages, draw_all, draw_figure, figure_kinds, pages_of
from plotting.neurons import plot_flipping
from plotting.style import NOISY, TOTAL, paper_style

GROUPS = 3


@pytest.fixture
def plant(tiny_file):
    """Write random tables of a run for each seed, and return their family."""

    def make(*overrides: str, seeds: int = 1, epochs: int = 50) -> Family:
        runs = []
        for seed in range(seeds):
            given = (f"train.epochs={epochs}", "precision=fp32", *overrides, f"seed={seed}")
            (config,) = load_configs(tiny_file, given)
            runs.append(Run.of(config))
            _write_tables(runs[-1], epochs, np.random.default_rng(seed))
        return Family(runs[0].directory.parent, tuple(runs))

    return make


def _write_tables(run: Run, epochs: int, random: np.random.Generator) -> None:
    run.directory.mkdir(parents=True)

    def rows(table, pairs) -> list[dict]:
        return [
            {column: random.random() for column in table.columns} | {"epoch": e, "group": g}
            for g, e in pairs
        ]

    history = rows(HISTORY, ((0, e) for e in range(epochs + 1)))
    HISTORY.write(run.directory, [{c: row[c] for c in HISTORY.columns} for row in history])
    pairs = [(g, e) for e in range(1, epochs + 1) for g in range(GROUPS)]
    ACCOUNTS.write(run.directory, rows(ACCOUNTS, pairs))
    rewound = [(g, e) for g in range(GROUPS) for e in range(0, epochs + 1, 2)]
    REWINDING.write(run.directory, rows(REWINDING, rewound))
    RETRAINING.write(run.directory, rows(RETRAINING, rewound))


@pytest.fixture
def draw():
    """Draw a figure in the paper's style, and close it after the test."""
    drawn = []

    def make(plot, subject):
        with paper_style():
            drawn.append(plot(subject))
            drawn[-1].draw_without_rendering()
        return drawn[-1]

    yield make
    plt.close("all")


def test_windows_of_fifty_epochs_are_the_papers(plant):
    family = plant(epochs=50)
    assert gradients.window_of(family) == (15, 20)
    assert gradients.windows_of(family) == (0, 5, 10, 15, 20, 25, 30, 35, 40, 45)


def test_windows_can_be_chosen(plant, draw):
    family = plant("plotting.window=[1, 4]", "plotting.windows=[0, 3, 8]", epochs=8)
    norms, table = draw(gradients.plot_gradient_norms, family), family.table(ACCOUNTS)
    (line,) = [line for line in norms.axes[0].lines if line.get_color() == NOISY]
    shown = (table["epoch"] > 1) & (table["epoch"] <= 4)
    expected = [table["norm_noisy"][shown & (table["group"] == g)].mean() for g in range(GROUPS)]
    np.testing.assert_allclose(line.get_ydata(), expected)
    over = draw(gradients.plot_gradient_norms_over_training, family)
    titles = [axes.get_title() for axes in over.axes if axes.get_visible()]
    assert titles == ["epochs 0 to 3", "epochs 3 to 8"]
    assert plotting_overrides(family.config) == (
        "plotting.window=[1, 4]", "plotting.windows=[0, 3, 8]",
    )  # fmt: skip


def test_a_window_after_the_training_is_named(plant):
    with pytest.raises(DataError, match="epoch 60 is after the last one, 50"):
        gradients.windows_of(plant("plotting.windows=[0, 60]"))


@pytest.mark.parametrize("value", ["[5]", "[5, 5]", "[9, 3]", "[0, 5, 10]", "[-1, 4]", "5"])
def test_a_window_is_two_ascending_epochs(tiny, value):
    with pytest.raises(UserError, match=r"plotting\.window"):
        tiny(f"plotting.window={value}")


def test_cosines_have_the_same_scale_for_every_run(plant, draw):
    axes = draw(gradients.plot_gradient_cosines, plant(epochs=5)).axes[0]
    (image,) = [child for child in axes.get_children() if isinstance(child, AxesImage)]
    assert image.get_clim() == (-1, 1)
    assert axes.yaxis_inverted(), "the first epoch on top"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("layer", "epoch")


def test_every_rewound_epoch_is_a_line(plant, draw):
    family = plant(seeds=2, epochs=50)
    curves, clean, noisy = draw(layers.plot_rewinding, family).axes
    assert TOTAL in {line.get_color() for line in curves.lines}
    table = layers.by_group(family, REWINDING)
    for axes, kind in ((clean, "clean"), (noisy, "noisy")):
        assert len(axes.lines) == len(axes.collections) == 26, "a line and a band for each epoch"
        for line, values in zip(axes.lines, table[f"acc_{kind}"].mean(0).T):
            np.testing.assert_allclose(line.get_ydata(), values)
    legend = noisy.get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["0", "10", "20", "30", "40", "50"]
    for line in noisy.lines:
        color = np.array(line.get_color()[:3])
        assert color @ [0.2126, 0.7152, 0.0722] < 0.75, "too light on white"


def test_rewinding_is_a_grid_of_noise_rates_and_models(plant, draw):
    families = [
        plant(f"data.noise_rate={rate}", f"model.width={width}", epochs=4)
        for width in (0.1, 0.05)
        for rate in (0.1, 0.2)
    ]
    figure = draw(layers.plot_rewinding_compared, families)
    grid = [axes.get_title() for axes in figure.axes]
    assert [" ".join(title.split()) for title in grid if title] == [
        "resnet9 width 0.1, 10% noise", "resnet9 width 0.05, 10% noise",
        "resnet9 width 0.1, 20% noise", "resnet9 width 0.05, 20% noise",
    ]  # fmt: skip
    assert [axes.get_ylabel() for axes in figure.axes[::2]] == ["clean", "noisy"] * 2


def test_retraining_compares_data_sets_and_noise_rates(plant, draw):
    families = [
        plant(f"data.noise_rate={rate}", f"data.train_size={size}", epochs=4)
        for size in (100, 150)
        for rate in (0.1, 0.2)
    ]
    figure = draw(layers.plot_retraining_compared, families)
    assert len(figure.axes) == GROUPS * 4
    titles = [axes.get_title().replace("\n", " ") for axes in figure.axes[:4]]
    assert titles == [f"glyphs {size} {rate}% noise" for size in (100, 150) for rate in (10, 20)]


def test_pages_hold_a_limited_number_of_families(plant):
    families = [
        plant(f"data.noise_rate={rate / 100}", f"model.width={width}", epochs=1)
        for width in (0.1, 0.05)
        for rate in range(1, 13)
    ]
    for kind in (kind for kind in figure_kinds() if kind.compares):
        if kind.fits(families[0]) and not kind.beyond:
            pages = [page for _, page in pages_of(kind, families)]
            assert max(map(len, pages)) <= kind.page <= 12
    assert [family for page in cut_into_pages(families, 8) for family in page] == families
    assert [len(page) for page in cut_into_pages(families[:14], 12)] == [12, 2]


def test_figures_of_atypical_examples_need_an_atypical_split(plant, tmp_path):
    family = plant(epochs=4)
    for number in ("8", "9", "19"):
        for drawing in draw_all(
            [family], tmp_path, plot_results.choose_kinds([number]), ["png"], False
        ):
            assert str(drawing).endswith("not drawn: it needs data.split: atypical")
    assert {kind.atypical for kind in figure_kinds() if "8" in kind.numbers} == {True}


def test_outliers_do_not_stretch_the_axis(plant, draw):
    family = plant(epochs=1)
    row = dict.fromkeys(FLIPPING.columns, 1) | {"groups": "0 2", "neurons_ids": "x"}
    rows = [row | {"memorized": i % 2, "neurons": 3 + i % 2} for i in range(199)]
    rows.append(row | {"memorized": 0, "neurons": 90, "acc_remaining_after": 0.1})
    FLIPPING.write(family.folder / "seed0", rows)
    source = {"settings": {"max_neurons": 100}}
    files.write_json(family.folder / "seed0" / "neuron_flipping.json", source)
    counts, after, by_layer = draw(plot_flipping, family).axes
    assert counts.get_xlim()[1] < 10
    assert after.get_xlim()[0] > 0.9
    for axes in (counts, after):
        assert axes.texts[0].get_text() == "1 beyond the axis"
        assert sum(patch.get_height() for patch in axes.patches) == pytest.approx(2)
    means = [line.get_xdata()[0] for line in counts.lines]
    clean, noisy = (
        np.mean([r["neurons"] for r in rows if r["memorized"] == kind]) for kind in (0, 1)
    )
    assert means == pytest.approx([clean, noisy]), "the outlier counts"
    assert len(after.lines) == len(by_layer.lines) == 2
    assert all(float(tick).is_integer() for tick in counts.get_xticks())


def test_figures_hold_no_date(plant, tmp_path):
    family = plant(epochs=2)
    pdf, png = draw_figure(gradients.plot_gradient_norms, family, tmp_path / "figure")
    first = pdf.read_bytes(), png.read_bytes()
    for word in (b"CreationDate", b"Matplotlib", b"tEXt"):
        assert not any(word in content for content in first)
    draw_figure(gradients.plot_gradient_norms, family, tmp_path / "figure")
    assert (pdf.read_bytes(), png.read_bytes()) == first


def test_every_kind_names_its_subject():
    for kind in figure_kinds():
        assert isinstance(kind, FigureKind)
        assert kind.subject.endswith(".")
        assert kind.subject[0].isupper()
