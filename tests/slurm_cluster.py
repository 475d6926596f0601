"""A Slurm cluster of one node: this machine, its loopback network, for as long as a test."""

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
AuthType=auth/munge
# cred_expire is also how long a requeued job waits before it begins again.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
JobRequeue=1
KillWait=10
ReturnToService=2
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=100000,bf_interval=1
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def why_not() -> str | None:
    """Return the reason why no cluster can be started here, if there is one."""
    programs = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
    if missing := [program for program in programs if not shutil.which(program, path=_path())]:
        return f"Slurm is not installed: no {', '.join(missing)}"
    return None if os.getuid() == 0 else "Slurm's daemons need root"


def _path() -> str:
    return os.environ.get("PATH", "") + ":/usr/sbin:/sbin"


@contextmanager
def slurm_cluster(cpus: int = 2) -> Iterator[Path]:
    """Slurm's commands, called inside, are about this cluster. Yields the folder of its logs."""
    # Not below pytest's folder: munge wants its socket where everybody can reach it.
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    folder.chmod(0o755)
    environment = {"PATH": _path(), "SLURM_CONF": str(folder / "slurm.conf")}
    before = {name: os.environ.get(name) for name in environment}
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        stack.callback(_put_back, before)
        os.environ.update(environment)
        _configure(folder, cpus)
        for command in (
            ["munged", "--foreground", "--force", *_munge_files(folder)],
            ["slurmctld", "-D"],
            ["slurmd", "-D"],
        ):
            log = stack.enter_context(open(folder / f"{command[0]}.out", "wb"))
            daemon = subprocess.Popen(command, stdout=log, stderr=log)
            stack.callback(_end, daemon)
            _wait_for(folder / "munge.socket")
        _wait_until_idle(folder)
        yield folder


def _put_back(before: dict[str, str | None]) -> None:
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _munge_files(folder: Path) -> list[str]:
    names = ("socket", "pid-file", "log-file", "seed-file", "key-file")
    return [f"--{name}={folder}/munge.{name.removesuffix('-file')}" for name in names]


def _configure(folder: Path, cpus: int) -> None:
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(128))
    for name in ("state", "spool"):
        (folder / name).mkdir()
    with socket.socket() as one, socket.socket() as other:
        for found in (one, other):
            found.bind(("127.0.0.1", 0))
        ports = [found.getsockname()[1] for found in (one, other)]
    host = socket.gethostname().partition(".")[0]
    content = CONFIGURATION.format(folder=folder, host=host, ports=ports, cpus=cpus)
    (folder / "slurm.conf").write_text(content)


def _end(daemon: subprocess.Popen) -> None:
    daemon.terminate()
    try:
        daemon.wait(20)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()


def _wait_for(path: Path) -> None:
    deadline = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} does not appear"
        time.sleep(0.05)


def _wait_until_idle(folder: Path) -> None:
    deadline = time.monotonic() + 30
    while True:
        done = subprocess.run(["sinfo", "-h", "-o", "%t"], capture_output=True, text=True)
        if done.stdout.strip() == "idle":
            return
        logs = "".join(path.read_text() for path in sorted(folder.glob("*.log")))
        assert time.monotonic() < deadline, f"{done.stdout}{done.stderr}\n{logs[-3000:]}"
        time.sleep(0.2)
