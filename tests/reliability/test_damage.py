"""Every file of a run, damaged in every way: named in one line or restored, and never believed.

Each script then either ends with status 2, names the file, and has changed nothing; or it ends as
if nothing had happened, because it does not need the file, or has made it again and says so.
plot_results.py draws the other runs and names the damaged file.
"""

import pickle
import random
import re
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

import example_tied_dropout
import gradient_accounting
import layer_retraining
import layer_rewinding
import neuron_flipping
import plot_results
from engine.launch.cli import run_script
from tests.conftest import complaints

CONFIG = """
device: cpu
data: {name: glyphs, train_size: 120, test_size: 40, noise_rate: 0.2}
model: {name: resnet9, width: 0.05}
train: {epochs: 2, batch_size: 32, peak_epoch: 1}
rewinding: {epochs: all}
retraining: {epochs: 1, peak_epoch: 1}
flipping: {examples: 2, noise_copies: 1, reference_batch: 20, remaining: 40, max_neurons: 2}
dropout: {kind: example_tied, forget: [1], forget_draws: 2}
"""
ON_PLAIN_RUNS = (gradient_accounting, layer_rewinding, layer_retraining, neuron_flipping)
SCRIPTS = (*ON_PLAIN_RUNS, example_tied_dropout)


class Bomb:
    """Unpickling it leaves a file behind."""

    trace = Path("executed")

    def __reduce__(self):
        return open, (str(self.trace), "w")


def with_a_wrong_byte(own: bytes) -> bytes:
    place = len(own) // 2
    return own[:place] + bytes([own[place] ^ 1]) + own[place + 1 :]


Damage = Callable[[bytes, bytes], bytes]  # of a file, and of another run's; what it becomes
DAMAGES: dict[str, Damage] = {
    "empty": lambda own, other: b"",
    "one byte": lambda own, other: own[:1],
    "a tenth": lambda own, other: own[: len(own) // 10],
    "half": lambda own, other: own[: len(own) // 2],
    "without its end": lambda own, other: own[:-3],
    "random bytes": lambda own, other: random.Random(5).randbytes(len(own)),
    "a wrong byte": lambda own, other: with_a_wrong_byte(own),
    "another run's": lambda own, other: other,
    "a pickle that runs code": lambda own, other: pickle.dumps(Bomb()),
}


def call(script, folder: Path) -> tuple[int, str, str]:
    """Status, stdout, and stderr without progress, in a process that stays."""
    out, error = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(error):
        if script is plot_results:
            status = plot_results.main([str(folder / "runs"), "--figure", "1", "--format", "png"])
        else:
            arguments = [str(folder / "config.yaml"), f"output_dir={folder / 'runs'}"]
            status = run_script(script.EXPERIMENT, "", arguments)
    lines = [part for line in complaints(error.getvalue()) for part in re.split(r"[\r\n]+", line)]
    said = [line for line in lines if line and not re.search(r"\d+%\||\d+(it|step|batch)", line)]
    return status, out.getvalue(), "\n".join(said)


def contents(folder: Path) -> dict[Path, bytes]:
    files = filter(Path.is_file, folder.rglob("*"))
    return {path.relative_to(folder): path.read_bytes() for path in files}


class Runs:
    """Finished runs of two seeds, in `measured` all of their measurements too."""

    def __init__(self, root: Path) -> None:
        self.trained, self.measured = root / "trained", root / "measured"
        self.trained.mkdir()
        (self.trained / "config.yaml").write_text(CONFIG + "seed: [0, 1]\n")
        for script in (gradient_accounting, example_tied_dropout):
            assert call(script, self.trained)[0] == 0
        for table in self.trained.rglob("seed*"):
            if "-tied-" in table.parent.name:  # its measurements are still to do
                for path in [*table.glob("*dropout*"), *table.glob("forgotten*")]:
                    path.unlink()
        shutil.copytree(self.trained, self.measured)
        for script in SCRIPTS:
            assert call(script, self.measured)[0] == 0
        for folder in (self.trained, self.measured):  # seed 1 only lends its files
            (folder / "config.yaml").write_text(CONFIG)
        self.said = {script: call(script, self.measured)[1] for script in (*SCRIPTS, plot_results)}

    def places(self, folder: Path) -> list[Path]:
        """The files of seed 0, one of each kind of part."""
        kinds = {}
        for path in sorted(folder.glob("runs/*/seed0/**/*")):
            if path.is_file():
                kind = (path.parent if "parts" in path.parts else path, path.suffix)
                kinds.setdefault(kind, path.relative_to(folder))
        return list(kinds.values())


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


def check(runs: Runs, base: Path, place: Path, damage: str, script, tmp_path: Path) -> str:
    """One file, one damage, one script; what became of it."""
    folder = tmp_path / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(base, folder)
    good = (base / place).read_bytes()
    other = base / str(place).replace("seed0", "seed1")
    bad = DAMAGES[damage](good, other.read_bytes() if other.exists() else b"")
    (folder / place).write_bytes(bad)
    before = contents(folder)
    what = f"{place}, {damage}, {script.__name__}"

    status, out, error = call(script, folder)
    assert not Bomb.trace.exists(), what
    if status == 2:
        assert error.count("\n") == 0, what
        assert str(folder / place) in error, f"{what}: {error}"
        assert re.search("put it back|delete|move|makes it again|trains it", error), (
            f"{what}: {error}"
        )
        assert contents(folder) == before, what
        return "refused"
    assert status == 0, f"{what}: {error}"
    if script is plot_results and error:
        assert error.count("\n") == 0, what
        pair = f"{place.with_suffix('.csv')}: is not what {place.name} describes"  # one of the two
        named = re.escape(pair if pair in error else str(place))
        assert re.search(rf"left out: .*{named}", error), f"{what}: {error}"
        assert out.count("\n") == runs.said[script].count("\n"), f"{what}: {out}"
        figures = {path for path in before if path.parent.name == "figures"}
        after = contents(folder)
        assert all(after[path] == before[path] for path in before.keys() - figures), what
        return "refused"
    assert out.replace(str(folder), "") == runs.said[script].replace(str(runs.measured), ""), what
    after = contents(folder)[place]
    if after == bad:
        return "not needed"
    assert after == good or place.suffix in (".pt", ".json"), what  # these tell of time and torch
    assert str(folder / place.with_suffix("")) in error, f"{what}: {error}"
    return "made again"


def all_cases(runs: Runs) -> list[tuple]:
    cases = []
    for base in (runs.trained, runs.measured):
        for place in runs.places(base):
            tied = "-tied-" in str(place)
            scripts = (example_tied_dropout,) if tied else (*ON_PLAIN_RUNS, plot_results)
            cases += [(base, place, d, s) for d in DAMAGES for s in scripts]
    return cases


def test_some_damage(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(Bomb, "trace", tmp_path / "executed")
    cases = random.Random(0).sample(all_cases(runs), 25)
    results = [check(runs, *case, tmp_path) for case in cases]
    assert {"refused", "not needed", "made again"} == set(results)


@pytest.mark.slow(reason="every file, every damage, every script: minutes")
def test_all_damage(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(Bomb, "trace", tmp_path / "executed")
    results = [check(runs, *case, tmp_path) for case in all_cases(runs)]
    counts = {result: results.count(result) for result in set(results)}
    print(counts)
    assert counts["refused"] > counts["made again"] > 50
