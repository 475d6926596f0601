"""Identities: settings without effect make no other run, and no version renames a run."""

import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest

import gradient_accounting
import layer_rewinding
from engine.errors import UserError
from engine.runs import files
from engine.runs.identity import deciding_settings, identity_of, run_directory, scores_given
from engine.runs.run import Run

GLYPHS = ("data.train_size=null", "data.test_size=null")
DROPOUT = ("dropout.kind=example_tied", "dropout.p_mem=0")
# Two ways to write the same training.
ALIKE = {
    "glyphs to train on": ((*GLYPHS,), ("data.train_size=4000", "data.test_size=null")),
    "glyphs to test on": ((*GLYPHS,), ("data.train_size=null", "data.test_size=1000")),
    "all images": (
        ("data.name=mnist", *GLYPHS),
        ("data.name=mnist", "data.train_size=60000", "data.test_size=10000"),
    ),
    "a seed of no noise": (
        ("data.noise_rate=0",), ("data.noise_rate=0", "data.noise_seed=5"),
    ),
    "scores that are not read": ((), ("data.c_scores=scores.npz",)),
    "human labels that are not read": ((), ("data.human_labels.path=scores.npz",)),
    "minus zero": (("train.weight_decay=0",), ("train.weight_decay=-0.0",)),
    "minus no noise": (("data.noise_rate=0",), ("data.noise_rate=-0.0",)),
    "how a rate falls that never falls": (
        ("train.peak_epoch=3",), ("train.peak_epoch=3", "train.schedule=warmup_cosine"),
    ),
    "a seed of no masks": (DROPOUT, (*DROPOUT, "dropout.seed=3")),
}  # fmt: skip
DIFFERENT = {
    "fewer glyphs": ((*GLYPHS,), ("data.train_size=3999", "data.test_size=null")),
    "a noise seed": ((), ("data.noise_seed=5",)),
    "a schedule": ((), ("train.schedule=warmup_cosine",)),
    "masks": (
        ("dropout.kind=example_tied",), ("dropout.kind=example_tied", "dropout.seed=3"),
    ),
    "scores that are read": (
        ("data.split=atypical",), ("data.split=atypical", "data.c_scores=scores.npz"),
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def scores(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("scores.npz", labels=np.arange(3), scores=np.ones(3))


@pytest.mark.parametrize("name", ALIKE)
def test_settings_without_effect_make_no_other_run(tiny, name):
    one, other = (tiny(*overrides) for overrides in ALIKE[name])
    assert identity_of(one) == identity_of(other)
    assert run_directory(one) == run_directory(other)


@pytest.mark.parametrize("name", DIFFERENT)
def test_settings_with_an_effect_do(tiny, name):
    one, other = (tiny(*overrides) for overrides in DIFFERENT[name])
    assert run_directory(one) != run_directory(other)


def test_the_sizes_of_glyphs_are_those_of_the_quickstart(tiny):
    """Shipped configurations write them out, and their runs keep their names."""
    settings = deciding_settings(tiny(*GLYPHS))
    assert (settings["data.train_size"], settings["data.test_size"]) == (4000, 1000)


def test_a_run_that_an_earlier_version_named_by_more_is_still_read(tiny, tmp_path):
    """It recorded a seed of no noise among what decides the weights."""
    run = Run.of(tiny("data.noise_rate=0", "data.noise_seed=5", "rewinding.epochs=[0,3]"))
    gradient_accounting.EXPERIMENT.main(run)
    source = files.read_json(run.provenance_path)
    source["settings"]["data.noise_seed"] = 5
    files.write_json(run.provenance_path, source)
    old = run.directory.rename(tmp_path / "old")
    layer_rewinding.EXPERIMENT.main(Run.at(old))
    source["settings"]["data.noise_seed"] = 6
    (old / "provenance.json").write_text(json.dumps(source))
    with pytest.raises(UserError, match="are not of the same run"):
        Run.at(old)


# ---------------------------------------------------------------- names of directories

LONG = {
    "dropout": ("dropout.kind=example_tied", "dropout.p_gen=0.12345", "dropout.p_mem=0.654321"),
    "human": (
        "data.name=cifar10", "data.split=human", "data.human_labels.path=scores.npz",
        "data.human_labels.column=random_label1", "dropout.kind=example_tied",
    ),
    "own data": ("data.name=npz", f"data.path={'x' * 90}.npz", "dropout.kind=sparse"),
    "many": ("train.peak_lr=0.000123", "train.weight_decay=0.000123", "seed=123"),
}  # fmt: skip


@pytest.mark.parametrize("name", LONG)
def test_names_are_short_and_end_with_the_digest_of_the_settings(tiny, tmp_path, name):
    (tmp_path / f"{'x' * 90}.npz").write_bytes(b"own")
    config = tiny(*LONG[name])
    found = run_directory(config).parent.name
    settings = {k: v for k, v in deciding_settings(config).items() if k != "seed"}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    assert len(found) <= 60
    assert found.endswith(f"-{digest[:8]}")
    assert not found.startswith(("-", "."))


def test_settings_that_matter_most_are_in_the_name(tiny):
    config = tiny("dropout.kind=example_tied", "dropout.p_gen=0.3", "dropout.p_mem=0.1")
    name = run_directory(config).parent.name.rpartition("-")[0]
    assert name == "glyphs-resnet9-noise0.2-tied-gen0.3-mem0.1-n150"
    assert run_directory(tiny()).parent.name.rpartition("-")[0] == (
        "glyphs-resnet9-noise0.2-n150-width0.05-epochs3"
    )


@pytest.mark.parametrize(
    "older", ["glyphs-resnet9-noise0.2-train_size150-test_size40-width0.05-batch_size32", "tiny"]
)
def test_a_run_under_an_older_name_is_found_and_its_next_seed_joins_it(tiny, older):
    run = Run.of(tiny())
    gradient_accounting.EXPERIMENT.main(run)
    folder = run.directory.parent
    digest = folder.name.rpartition("-")[2]
    renamed = folder.rename(folder.with_name(f"{older}-{digest}"))
    assert Run.of(tiny()).directory == renamed / "seed0"
    assert Run.of(tiny()).finished
    assert Run.of(tiny("seed=1")).directory == renamed / "seed1"
    assert Run.of(tiny("data.noise_rate=0.3")).directory.parent != renamed


def test_each_seed_is_found_where_two_versions_trained_the_seeds(tiny):
    directories = [run_directory(tiny(f"seed={seed}")) for seed in (0, 1)]
    old = directories[0].parent.with_name(f"old-{directories[0].parent.name[-8:]}")
    (old / "seed0").mkdir(parents=True)
    directories[1].mkdir(parents=True)
    assert run_directory(tiny("seed=0")) == old / "seed0"
    assert run_directory(tiny("seed=1")) == directories[1]


def test_tables_know_which_c_scores_they_were_made_with(tiny, tmp_path):
    """A file that no training reads, and published scores that come after the tables."""
    path = tmp_path / "scores.npz"
    path.write_bytes(b"some")
    given = tiny(f"data.c_scores={path}")
    before = scores_given(given)
    path.write_bytes(b"others")
    assert before != scores_given(given)
    assert scores_given(replace(given, data=replace(given.data, split="atypical"))) == {}
    mnist = replace(tiny(), data=replace(tiny().data, name="mnist", root=str(tmp_path)))
    assert scores_given(mnist) == {"c_scores": "none"}
    (tmp_path / "c_scores").mkdir()
    (tmp_path / "c_scores" / "mnist-cscores.npy").touch()
    assert scores_given(mnist) == {}
    assert scores_given(tiny()) == {}, "glyphs know their own"
