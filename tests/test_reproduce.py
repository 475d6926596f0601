"""reproduce.py: every script in order, each piece of work once, and resuming after a stop."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import gradient_accounting
import reproduce
from engine.config.load import load_configs
from engine.runs.run import Run

REPOSITORY = Path(__file__).resolve().parents[1]
CONFIGS = sorted((REPOSITORY / "configs").rglob("*.yaml"))
SMALL = [
    "train.epochs=2", "rewinding.epochs=[0,1,...]", "retraining.epochs=1",
    "retraining.peak_epoch=1", "flipping.examples=2", "flipping.reference_batch=8",
    "flipping.noise_copies=1", "flipping.remaining=20", "flipping.max_neurons=3",
    "model.width=0.1", "dropout.forget_draws=1", "dropout.forget=[1]",
]  # fmt: skip
TABLES = {
    "gradient_accounting.csv", "history.csv", "layers.csv", "layer_rewinding.csv",
    "layer_retraining.csv",
    "neuron_flipping.csv", "mislabel_detection.csv",
}  # fmt: skip


def test_everything_in_order_and_then_nothing(tiny_file, tmp_path, capsys):
    arguments = [str(tiny_file), *SMALL, "sweep.dropout.kind=[example_tied, standard]"]
    assert reproduce.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        "gradient accounting", "layer rewinding", "layer retraining", "neuron flipping",
        "example tied dropout", "example tied dropout", "summary", "report",
    ]  # fmt: skip
    plain = Path(lines[0].split()[-1])
    assert {path.name for path in plain.glob("*.csv")} == TABLES
    figures = {path.name for path in (plain.parent / "figures").glob("*.png")}
    assert {"gradient_norms.png", "rewinding.png", "retraining.png", "neurons.png"} <= figures

    (report,) = tmp_path.glob("runs/report-tiny-*/report.html")
    assert lines[-1] == f"report: {report}"
    place, _, lacking = lines[-2].partition(" (")
    assert place == f"summary: {report.with_name('summary.json')}"
    assert "claims not applicable" in lacking
    summary = json.loads(report.with_name("summary.json").read_text())
    verdicts = {entry["claim"]: entry["verdict"] for entry in summary["claims"]}
    for experiment in ("gradients", "rewinding", "retraining", "flipping", "dropout"):
        own = [v for name, v in verdicts.items() if name.partition(".")[0] == experiment]
        assert any(verdict != "not measured" for verdict in own), experiment

    before = {p: p.stat().st_mtime_ns for p in tmp_path.glob("runs/*/seed*/*.csv")}
    assert len(before) > len(TABLES)
    assert reproduce.main(arguments) == 0
    assert capsys.readouterr().out.splitlines() == lines
    assert {p: p.stat().st_mtime_ns for p in tmp_path.glob("runs/*/seed*/*.csv")} == before


@pytest.mark.parametrize("experiment", ["rewinding", "retraining"])
def test_weights_that_will_not_be_kept_are_missed_before_training(
    tiny_file, tmp_path, capsys, experiment
):
    asked = ["checkpoints.keep=[3]", "rewinding.epochs=[0,3]", f"experiments=[{experiment}]"]
    assert reproduce.main([str(tiny_file), *asked]) == 2
    said = capsys.readouterr().err
    assert f"checkpoints.keep: [3] is not enough: layer_{experiment}" in said
    assert "the weights of epochs [0]; keep them" in said
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_configuration_can_be_done_to_its_end(path):
    """No part of it asks for weights that another part throws away."""
    configs = load_configs(path)
    if configs[0].data.name == "npz":  # a file of one's own
        configs = load_configs(path, ["data.name=cifar10", "data.path=null"])
    assert reproduce.make_jobs(configs)


@pytest.mark.usefixtures("no_figures")
def test_a_deleted_measurement_is_measured_again_and_nothing_else(tiny_file, capsys):
    arguments = [str(tiny_file), *SMALL, "experiments=[rewinding]"]
    assert reproduce.main(arguments) == 0
    directory = Path(capsys.readouterr().out.splitlines()[0].split()[-1])
    table = directory / "layer_rewinding.csv"
    content, weights = table.read_bytes(), directory / "checkpoints" / "epoch_002.pt"
    trained = weights.stat().st_mtime_ns
    table.unlink()
    assert reproduce.main(arguments) == 0
    assert table.read_bytes() == content
    assert weights.stat().st_mtime_ns == trained


def test_configurations_that_ask_for_the_same_work_share_it(tiny_file):
    configs = load_configs(tiny_file, ["sweep.dropout.kind=[none, example_tied, sparse]"])
    jobs = reproduce.make_jobs(configs)
    assert [job.experiment.key for job in jobs].count("gradients") == 1
    assert [job.experiment.key for job in jobs].count("dropout") == 2


def test_experiments_are_a_choice(tiny_file):
    for chosen, expected in (("[]", 1), ("[rewinding, flipping]", 3), ("all", 4)):
        jobs = reproduce.make_jobs(load_configs(tiny_file, [f"experiments={chosen}"]))
        assert len(jobs) == expected


@pytest.mark.parametrize("kind", ["example_tied", "none"])
@pytest.mark.parametrize("asked", ["[planted]", "[erasure]", "[dropout, erasure]"])
def test_measurements_of_dropout_s_runs_train_no_other_network(tiny_file, asked, kind):
    (config,) = load_configs(tiny_file, [f"experiments={asked}", f"dropout.kind={kind}"])
    jobs = reproduce.make_jobs([config])
    assert jobs[0].experiment.key == "dropout"
    assert len({job.run.directory for job in jobs}) == 1


def test_dropout_alone_is_what_its_script_does(tiny_file):
    kinds = "sweep.dropout.kind=[example_tied, none]"
    jobs = reproduce.make_jobs(load_configs(tiny_file, ["experiments=[dropout]", kinds]))
    found = [(job.experiment.key, job.run.config.dropout.kind) for job in jobs]
    assert found == [("dropout", "example_tied"), ("dropout", "none")]


@pytest.mark.usefixtures("no_figures")
def test_out_of_time_stops_cleanly_and_the_same_command_resumes(tiny_file, capsys):
    overrides = [*SMALL[1:], "train.epochs=5", "experiments=[rewinding]"]
    arguments = [str(tiny_file), *overrides]
    rounds = 0
    while True:
        status = reproduce.main([*arguments, "--time-budget", "0"])
        lines = capsys.readouterr().out.splitlines()
        if not lines[-1].startswith("out of time: "):
            assert status == 0
            break
        assert status == 75
        rounds += 1
        assert rounds < 30
    assert rounds >= 5, "a budget of nothing must stop at every safe point"
    (stopped,), (whole,) = (
        [Run.of(config) for config in load_configs(tiny_file, [*overrides, *place])]
        for place in ([], [f"output_dir={tiny_file.parent / 'whole'}"])
    )
    assert stopped.finished
    gradient_accounting.EXPERIMENT.main(whole)
    for name in ("history.csv", "gradient_accounting.csv"):
        assert (stopped.directory / name).read_bytes() == (whole.directory / name).read_bytes()


@pytest.mark.usefixtures("no_figures")
def test_a_run_that_fails_does_not_stop_the_others(tiny_file, capsys):
    arguments = [str(tiny_file), *SMALL, "sweep.train.peak_lr=[1e30, 0.1]", "experiments=[]"]
    assert reproduce.main(arguments) == 1
    printed = capsys.readouterr()
    assert "the loss became" in printed.err
    assert printed.out.count("gradient accounting: ") == 1


@pytest.mark.usefixtures("no_figures")
def test_a_report_is_never_replaced_by_one_of_other_runs(tiny_file, tmp_path, capsys):
    def report(*overrides: str) -> Path:
        asked = [str(tiny_file), "train.epochs=1", "experiments=[]", *overrides]
        assert reproduce.main(asked) == 0
        return Path(capsys.readouterr().out.splitlines()[-1].removeprefix("report: "))

    plain, louder = report(), report("data.noise_rate=0.3")
    assert plain.parent != louder.parent
    assert "data.noise_rate=0.3" in louder.parent.name
    assert "data.noise_rate=0.3" in louder.read_text()
    assert "data.noise_rate=0.3" not in plain.read_text()
    assert report("device=cpu") == plain

    before = plain.read_bytes()
    tiny_file.write_text(tiny_file.read_text().replace("noise_rate: 0.2", "noise_rate: 0.4"))
    edited = report()
    assert edited.parent.name.startswith(f"{plain.parent.name}-")
    assert plain.read_bytes() == before
    assert report() == edited


@pytest.mark.usefixtures("no_figures")
def test_a_report_of_the_same_runs_and_more_replaces_the_former(tiny_file, capsys):
    content = tiny_file.read_text()
    places = []
    for seeds in ("[0]", "[0, 1]"):
        tiny_file.write_text(content + f"seed: {seeds}\n")
        assert reproduce.main([str(tiny_file), "train.epochs=1", "experiments=[]"]) == 0
        places.append(capsys.readouterr().out.splitlines()[-1])
    assert places[0] == places[1]


def test_the_first_argument_may_be_an_override(capsys):
    assert reproduce.main(["seed=[3,4]", "--dry-run"]) == 0
    assert "seed 4" in capsys.readouterr().out
    assert reproduce.main(["sede=3"]) == 2
    assert "did you mean seed?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("number", "status"),
    [
        (signal.SIGTERM, 143),
        (signal.SIGINT, 130),
        pytest.param(
            signal.SIGUSR1, 138, marks=pytest.mark.slow(reason="as the others, another process")
        ),
    ],
)
def test_signals_end_a_real_process_with_one_line(tiny_file, number, status):
    command = [sys.executable, "reproduce.py", str(tiny_file), "train.epochs=2000"]
    process = subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not list(tiny_file.parent.glob("runs/*/*/resume/epoch_001.pt")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == status
    assert error.splitlines()[-1] == "Interrupted. Rerun the same command to resume."
    assert "Traceback" not in error
    assert not list(tiny_file.parent.rglob("*.tmp"))


@pytest.mark.parametrize("option", [["--gpus", "0"], ["--time-budget", "60"]], ids=str)
@pytest.mark.parametrize("way", ["--slurm", "--collect"])
def test_an_option_without_effect_is_refused(tiny_file, capsys, way, option):
    assert reproduce.main([str(tiny_file), way, *option]) == 2
    expected = f"command line: argument {option[0]}: not allowed with argument {way}; see --help\n"
    assert capsys.readouterr().err == expected


def test_a_machine_without_a_gpu_does_not_decide_the_precision_of_jobs_with_one(
    tiny_file, capsys, monkeypatch
):
    submitted = []
    monkeypatch.setattr(reproduce.torch.cuda, "is_available", lambda: False)
    job = SimpleNamespace(job_id="1_0")
    monkeypatch.setattr(reproduce.slurm, "submit", lambda *what: submitted.append(what) or [job])
    monkeypatch.setattr(reproduce.slurm, "submit_after", lambda *_: job)
    arguments = [str(tiny_file), "device=auto", "--slurm"]
    assert reproduce.main([*arguments, "precision=auto"]) == 2
    assert "precision: auto is not allowed" in capsys.readouterr().err
    assert submitted == []
    assert reproduce.main([*arguments, "precision=fp32"]) == 0
    assert len(submitted) == 1
