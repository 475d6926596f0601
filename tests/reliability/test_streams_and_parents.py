"""Real processes: closed streams, a killed parent, names that reach a cluster, an odd user."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from engine.config.schema import SlurmConfig
from engine.errors import UserError
from engine.launch import slurm
from reproduce import folder_of

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIG = """
device: cpu
data: {name: glyphs, train_size: 60, test_size: 20, noise_rate: 0.2}
model: {name: resnet9, width: 0.05}
train: {epochs: 2, batch_size: 32, peak_epoch: 1}
"""
LONG = CONFIG.replace("epochs: 2", "epochs: 5000").replace("size: 60", "size: 2000")


SLOW = pytest.mark.slow(reason="as the others, another process that imports torch")


@pytest.mark.parametrize(
    "closed", ["2>&-", ">&-", pytest.param(">&- 2>&-", marks=SLOW), "<&- >&- 2>&-"]
)
def test_closed_streams_change_nothing(tmp_path, closed):
    (tmp_path / "config.yaml").write_text(CONFIG)
    script = REPOSITORY / "gradient_accounting.py"
    shell = f'exec "{sys.executable}" "{script}" config.yaml {closed}'
    process = subprocess.run(["bash", "-c", shell], cwd=tmp_path, capture_output=True, timeout=240)
    assert process.returncode == 0, process
    assert len(list(tmp_path.glob("runs/*/seed0/history.csv"))) == 1


@pytest.mark.slow(reason="three processes that import torch")
def test_a_killed_parent_ends_its_children(tmp_path):
    (tmp_path / "config.yaml").write_text(LONG + "seed: [0, 1]\nexperiments: []\n")
    command = [sys.executable, str(REPOSITORY / "reproduce.py"), "config.yaml", "--jobs", "2"]
    parent = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: len(list(tmp_path.rglob("resume/epoch_000.pt"))) == 2)
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    wait_for(lambda: not list(tmp_path.rglob("claim.json")))
    assert len(list(tmp_path.rglob("history.csv"))) == 2, "they saved before they ended"


def wait_for(condition, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("a\n#SBATCH --wrap=x.yaml", "report-a_SBATCH_--wrap=x"),
        (os.fsdecode(b"a\xff.yaml"), "report-a_"),
        ("名.yaml", "report-名"),
    ],
)
def test_a_configurations_name_becomes_a_folders_name(tiny, name, folder):
    assert folder_of(tiny(), ["report", Path(name).stem]).name == folder


def test_no_line_of_a_jobs_script_comes_from_a_name(tmp_path, monkeypatch):
    """Neither from the folder, nor from what lies above it."""
    pytest.importorskip("submitit")
    with pytest.raises(UserError, match="its name must be text on one line"):
        slurm._make_executor(tmp_path / "a\n#SBATCH", SlurmConfig(), "local", 0)
    with pytest.raises(UserError, match="without %"):
        slurm._make_executor(tmp_path / "50%j", SlurmConfig(), "local", 0)
    names = []

    class Executor:
        def __init__(self, *arguments, **named):
            pass

        def update_parameters(self, **parameters):
            names.append(parameters["name"])

    monkeypatch.setattr(slurm._submitit(), "AutoExecutor", Executor)
    slurm._make_executor(tmp_path / "slurm-a b;$(x)", SlurmConfig(), "local", 0)
    assert names == ["slurm-a_b___x_"]


STRANGER = 65534  # nobody
# Only in a mount namespace of its own: opens the folder that this Python is installed in.
BECOME_STRANGER = """
if [ -n "$2" ]; then
    mount --bind "$1" "$3" && mount -t tmpfs -o mode=755 none "$2" &&
    mkdir -p "$1" && mount --bind "$3" "$1" || exit 99
fi
shift 3
exec setpriv --reuid 65534 --regid 65534 --clear-groups --inh-caps=-all --bounding-set=-all "$@"
"""


def as_a_stranger(folder: Path) -> list[str]:
    """Return the words before a command that run it as nobody, without any privilege."""
    if os.getuid() != 0:
        return []
    python = Path(sys.base_prefix)
    closed = [above for above in python.parents if not above.stat().st_mode & 0o001]
    (place := folder / "python").mkdir()
    words = [str(python), str(closed[-1]) if closed else "", str(place)]
    start = ["unshare", "--mount", "sh", "-c", BECOME_STRANGER, "sh", *words]
    tried = subprocess.run([*start, sys.executable, "-c", "import torch"], capture_output=True)
    if tried.returncode:
        pytest.skip(f"this machine does not let nobody run this Python: {tried.stderr[-200:]!r}")
    return start


@pytest.mark.slow(reason="training, a measurement and a report in processes of another user")
def test_a_user_without_privileges_gets_from_training_to_figures():
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        stranger = as_a_stranger(folder)
        (folder / "config.yaml").write_text(CONFIG + "experiments: [rewinding]\n")
        (folder / "closed").mkdir(mode=0)
        if stranger:
            os.chown(folder, STRANGER, STRANGER)
        words = [*stranger, sys.executable, str(REPOSITORY / "reproduce.py"), "config.yaml"]
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=560)
        assert done.returncode == 0, done.stderr
        (report,) = folder.rglob("report.html")
        assert report.stat().st_uid == (STRANGER if stranger else os.getuid())
        done = subprocess.run(
            [*words, "output_dir=closed/runs"], cwd=folder, capture_output=True, text=True
        )
        assert done.returncode in (1, 2), done.stderr
        assert "closed/runs" in done.stderr.splitlines()[-1]
        assert "ermission" in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr
