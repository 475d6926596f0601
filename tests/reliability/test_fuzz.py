"""Random edits of configurations and random data files: one line or a right run, nothing else."""

from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import gradient_accounting
from data import DataError, Dataset, load_dataset
from engine.config.load import SCHEMA, flatten, load_configs, to_yaml
from engine.config.schema import impossible
from engine.errors import UserError
from engine.launch.cli import run_script
from tests.conftest import complaints

REPOSITORY = Path(__file__).resolve().parents[2]
BASE = """
name: fuzz
device: cpu
seed: 3
data:
  name: glyphs
  train_size: 40
  noise_rate: 0.2
model: {name: resnet9, width: 0.5}
train:
  epochs: 20
  peak_lr: 1e-3
checkpoints: {keep: [0, 5]}
rewinding: {epochs: [0, 5, ...]}
dropout: {kind: example_tied, forget: [1, 3]}
sweep:
  data.noise_seed: [0, 1]
"""
WORDS = [
    "", " ", "  ", "\t", "\n", "~", "null", "nan", ".nan", ".inf", "-.inf", "-1", "0", "1", "2.5",
    "1e999", "1e-999", "0x10", "0b2", "1_000", "12:30:45", "2023-01-01", "9" * 30, "9" * 5000,
    "true", "no", "[]", "{}", "[[]]", "[1, 2]", "{a: b}", "[...]", "*a", "&a", "&a x", "<<: *a",
    "!!python/name:os.system", "!!binary |", "!!set {a}", "? ", "- ", ": ", ":", ",", "[", "]", "{",
    "}", "'", '"', "|", ">", "#", "%", "@", "`", "---\n", "...\n", "\x00", "\x07", "\ufeff", "é",
    "名", "\u2028", "\ud800", "../../x", "/dev/null", "all", "glyphs", "npz", "vit_small", "human",
    "extends: ", "extends: .", "sweep:\n  ", "\n  ", *SCHEMA,
]  # fmt: skip
edits = st.lists(
    st.tuples(
        st.sampled_from(["insert", "replace", "repeat line", "drop line", "cut"]),
        st.integers(0, len(BASE)),
        st.sampled_from(WORDS) | st.text(max_size=6),
    ),
    min_size=1,
    max_size=4,
)


def edited(text: str, changes: list[tuple[str, int, str]]) -> str:
    for kind, place, word in changes:
        lines, place = text.splitlines(keepends=True) or [""], place % (len(text) + 1)
        line = place % len(lines)
        if kind == "insert":
            text = text[:place] + word + text[place:]
        elif kind == "replace":
            value = lines[line].rpartition(": ")
            text = "".join([*lines[:line], *value[:2], word, "\n", *lines[line + 1 :]])
        elif kind == "repeat line":
            text = "".join([*lines[:line], lines[line], *lines[line:]])
        elif kind == "drop line":
            text = "".join([*lines[:line], *lines[line + 1 :]])
        else:
            text = text[:place]
    return text


def leaves(tree: dict, prefix: str = ""):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        elif value is not None or prefix + key in SCHEMA:
            yield prefix + key, value


def require_one_line(error: Exception) -> None:
    assert "\n" not in str(error)
    assert 10 < len(str(error)) < 2000


def check_configuration(path: Path, overrides: list[str]) -> None:
    try:
        configs = load_configs(path, overrides)
    except UserError as error:
        require_one_line(error)
        return
    for config in configs[:3]:
        assert impossible(config) is None
        again = path.with_name("again.yaml")
        again.write_text(to_yaml(config), encoding="utf-8")
        assert load_configs(again) == [config]
    if overrides:
        return
    tree = yaml.safe_load(path.read_text(encoding="utf-8"))  # read by somebody else
    tree.pop("sweep", None)
    for key, value in leaves(tree):
        assert key in SCHEMA, "an unknown key was accepted"
        if type(value) in (int, float, bool) and key != "seed":
            assert flatten(configs[0])[key] == value


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


few = settings(max_examples=150, deadline=None, derandomize=True, database=None)
many = settings(max_examples=5000, deadline=None, database=None)


def fuzz_configurations(folder: Path, changes) -> None:
    path = folder / "a.yaml"
    path.write_text(edited(BASE, changes), encoding="utf-8", errors="surrogatepass")
    check_configuration(path, [])


def fuzz_overrides(folder: Path, key: str, value: str, swept: bool) -> None:
    path = folder / "base.yaml"
    path.write_text(BASE)
    check_configuration(path, [f"{'sweep.' * swept}{key}={value}"])


overrides = (st.sampled_from(list(SCHEMA)), st.sampled_from(WORDS) | st.text(max_size=9))


@few
@given(edits)
def test_edited_configurations(folder, changes):
    fuzz_configurations(folder, changes)


@pytest.mark.slow(reason="5,000 of them: minutes")
@many
@given(edits)
def test_many_edited_configurations(folder, changes):
    fuzz_configurations(folder, changes)


@few
@given(*overrides, st.booleans())
def test_overrides(folder, key, value, swept):
    fuzz_overrides(folder, key, value, swept)


@pytest.mark.slow(reason="5,000 of them: minutes")
@many
@given(*overrides, st.booleans())
def test_many_overrides(folder, key, value, swept):
    fuzz_overrides(folder, key, value, swept)


# ---------------------------------------------------------------- data files

TYPES = ["uint8", "int64", "float32", "float64", "bool", "int8", "uint64", "complex64", "<U3"]


@st.composite
def data_files(draw) -> dict[str, np.ndarray]:
    """Good files, but for up to two arrays that are anything."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    n, m, classes = draw(st.integers(2, 14)), draw(st.integers(1, 5)), draw(st.integers(1, 4))
    size, channels = draw(st.integers(1, 20)), draw(st.sampled_from([(), (1,), (3,)]))
    arrays = {
        "x_train": rng.integers(0, 256, (n, size, size, *channels), dtype=np.uint8),
        "y_train": np.arange(n) % classes,
        "x_test": rng.integers(0, 256, (m, size, size, *channels), dtype=np.uint8),
        "y_test": rng.integers(0, classes, m),
        "c_score": rng.random(n),
        "noisy_label": rng.integers(0, classes, n),
    }
    for name in draw(st.lists(st.sampled_from([*arrays, "x"]), max_size=2)):
        shape = draw(st.lists(st.integers(0, 7), max_size=5))
        value = rng.choice([0.0, 1.0, 2.0, -1.0, 0.5, np.nan, np.inf, 1e30], shape)
        with np.errstate(all="ignore"):
            arrays[name] = np.asarray(value).astype(draw(st.sampled_from(TYPES)))
    for name in draw(st.lists(st.sampled_from(list(arrays)), max_size=1)):
        del arrays[name]
    return arrays


def load(path: Path, arrays: dict) -> Dataset | None:
    np.savez(path, **arrays)
    try:
        return load_dataset("npz", path=path)
    except DataError as error:
        require_one_line(error)
        return None


def check_dataset(dataset: Dataset, arrays: dict) -> None:
    """An accepted configuration has the values of its file."""
    assert dataset.images.dtype == dataset.test_images.dtype
    assert dataset.images.shape[1] in (1, 3)
    classes = len(dataset.class_names)
    assert classes >= 2
    assert sorted(set(dataset.label.tolist())) == list(range(classes))
    assert dataset.label.tolist() == arrays["y_train"].tolist()
    assert set(dataset.test_label.tolist()) <= set(range(classes))
    assert int(dataset.images.sum()) == arrays["x_train"].sum(dtype=int)
    if dataset.typicality is not None:
        assert 0 <= dataset.typicality.min() <= dataset.typicality.max() <= 1


@few
@given(data_files())
def test_data_files(folder, arrays):
    if dataset := load(folder / "own.npz", arrays):
        check_dataset(dataset, arrays)


def fuzz_runs(folder: Path, arrays: dict, split: str, model: str) -> None:
    """A whole run on such a file: an exit status, one line, and never a traceback."""
    load(folder / "own.npz", arrays)
    arguments = [str(folder / "own.yaml"), f"data.split={split}", f"model.name={model}"]
    vit = "name: vit_small, patch: 4, dim: 8, depth: 1, heads: 2, dim_head: 4, mlp_dim: 8"
    (folder / "own.yaml").write_text(
        f"device: cpu\noutput_dir: {folder / 'runs'}\n"
        f"data: {{name: npz, path: {folder / 'own.npz'}}}\n"
        f"model: {{{vit if model == 'vit_small' else 'width: 0.05'}}}\n"
        "train: {epochs: 1, peak_epoch: 0, batch_size: 4}\n"
    )
    out, error = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(error):
        status = run_script(gradient_accounting.EXPERIMENT, "", arguments)
    assert status in (0, 1, 2)
    assert (status == 0) == bool(out.getvalue())
    if status == 2:
        assert len(complaints(error.getvalue())) == 1


runs = (
    data_files(),
    st.sampled_from(["noise", "human", "atypical"]),
    st.sampled_from(["resnet9", "vit_small"]),
)


@settings(few, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(*runs)
def test_runs_on_random_data(folder, arrays, split, model):
    fuzz_runs(folder, arrays, split, model)


@pytest.mark.slow(reason="300 runs: a minute")
@settings(many, max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(*runs)
def test_many_runs_on_random_data(folder, arrays, split, model):
    fuzz_runs(folder, arrays, split, model)
