"""A disk that answers EIO, and two hosts with clocks that differ: one line, and no lost results.

The failing disk is a library that is loaded before libc's own calls.
"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int fails(const char *call, const char *path) {
    static int count = 0;
    const char *asked = getenv("EIO_CALL"), *part = getenv("EIO_PATH");
    if (!asked || strcmp(asked, call) || !strstr(path, part)) return 0;
    if (count++ < atoi(getenv("EIO_AFTER"))) return 0;
    errno = EIO;
    return 1;
}
static int fails_at(const char *call, int file) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t size = readlink(link, path, sizeof path - 1);
    path[size < 0 ? 0 : size] = 0;
    return fails(call, path);
}
int fsync(int file) {
    int (*real)(int) = dlsym(RTLD_NEXT, "fsync");
    return fails_at("fsync", file) ? -1 : real(file);
}
ssize_t write(int file, const void *content, size_t size) {
    ssize_t (*real)(int, const void *, size_t) = dlsym(RTLD_NEXT, "write");
    return fails_at("write", file) ? -1 : real(file, content, size);
}
ssize_t read(int file, void *content, size_t size) {
    ssize_t (*real)(int, void *, size_t) = dlsym(RTLD_NEXT, "read");
    return fails_at("read", file) ? -1 : real(file, content, size);
}
int rename(const char *from, const char *to) {
    int (*real)(const char *, const char *) = dlsym(RTLD_NEXT, "rename");
    return fails("rename", to) ? -1 : real(from, to);
}
"""
CONFIG = """
device: cpu
data: {name: glyphs, train_size: 60, test_size: 20, noise_rate: 0.2}
model: {name: resnet9, width: 0.05}
train: {epochs: 2, batch_size: 32, peak_epoch: 1}
"""
COMMAND = [sys.executable, str(REPOSITORY / "gradient_accounting.py"), "config.yaml"]


@pytest.fixture(scope="module")
def shim(tmp_path_factory) -> Path:
    if not shutil.which("gcc"):
        pytest.skip("this machine has no compiler")
    folder = tmp_path_factory.mktemp("shim")
    (folder / "eio.c").write_text(SHIM)
    build = ["gcc", "-shared", "-fPIC", "-o", "eio.so", "eio.c", "-ldl"]
    subprocess.run(build, cwd=folder, check=True)
    return folder / "eio.so"


def call(folder: Path, **environment: str) -> subprocess.CompletedProcess:
    (folder / "config.yaml").write_text(CONFIG)
    return subprocess.run(
        COMMAND, cwd=folder, env=os.environ | environment, capture_output=True, text=True,
        timeout=560,
    )  # fmt: skip


def tables(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*.csv")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("whole")
    assert call(folder).returncode == 0
    return tables(folder)


@pytest.mark.slow(reason="eight processes that train")
@pytest.mark.parametrize(
    ("name", "after"), [("fsync", 0), ("fsync", 7), ("write", 3), ("rename", 0), ("rename", 9)]
)
def test_an_io_error_while_writing_is_one_line(shim, whole, tmp_path, name, after):
    failed = call(
        tmp_path, LD_PRELOAD=str(shim), EIO_CALL=name, EIO_PATH="seed0", EIO_AFTER=str(after)
    )
    assert failed.returncode == 1, failed.stderr
    line = failed.stderr.rstrip("\n").splitlines()[-1]
    assert "Input/output error" in line
    assert "/seed0/" in line
    assert ".tmp" not in line
    assert "Traceback" not in failed.stderr
    assert call(tmp_path).returncode == 0
    assert tables(tmp_path) == whole


@pytest.mark.slow(reason="processes that train")
@pytest.mark.parametrize("part", ["checkpoints/", "history.csv", "provenance.json"])
def test_an_io_error_while_reading_is_one_line(shim, tmp_path, part):
    assert call(tmp_path).returncode == 0
    before = tables(tmp_path)
    failed = call(tmp_path, LD_PRELOAD=str(shim), EIO_CALL="read", EIO_PATH=part, EIO_AFTER="0")
    if part == "checkpoints/":
        assert failed.returncode == 0, "a finished run's tables need no weights"
    else:
        assert failed.returncode in (1, 2), failed.stderr
        assert part in failed.stderr.splitlines()[-1]
        assert "Traceback" not in failed.stderr
    assert tables(tmp_path) == before


def another_host(name: str) -> list[str]:
    """Return the words before a command that give it a host name, a network, and pids of its own.

    Its processes end with the first one, as those of a host do that loses power.
    """
    spaces = ["unshare", "--uts", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
    host = [*spaces, "sh", "-c", f'hostname {name} && exec "$@"', "sh"]
    if subprocess.run([*host, "true"], capture_output=True).returncode:
        pytest.skip("this machine allows no namespaces")
    return host


@pytest.mark.slow(reason="a process in namespaces of its own, which must first import torch")
def test_another_host_with_another_clock_waits_for_a_living_holder(tmp_path):
    """A host name and a pid space of its own, and a clock five minutes ahead.

    The age of a lock is read off the file system's clock, so that the shift changes nothing.
    """
    hold = (
        "import sys, time\nfrom pathlib import Path\nfrom engine.runs.locking import lock\n"
        "with lock(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(200)\n"
    )
    ask = (
        "import sys, time\nfrom pathlib import Path\nfrom engine.runs import locking\n"
        "clock = time.time\ntime.time = lambda: clock() + 300\n"
        "try:\n    with locking.lock(Path(sys.argv[1])):\n        print('taken over')\n"
        "except locking.Held as error:\n    print(error)\n"
    )
    node7, run = another_host("node7"), tmp_path / "run"
    holder = subprocess.Popen(
        [*node7, sys.executable, "-c", hold, str(run)],
        cwd=REPOSITORY, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    question = [sys.executable, "-c", ask, str(run)]
    try:
        assert holder.stdout.readline() == "held\n"
        asked = subprocess.run(question, cwd=REPOSITORY, capture_output=True, text=True)
        assert asked.stdout.startswith("held by process 1 on node7"), asked
    finally:
        holder.kill()
        holder.wait()
    long_ago = time.time() - 200
    os.utime(run / "claim.json", (long_ago, long_ago))
    asked = subprocess.run(question, cwd=REPOSITORY, capture_output=True, text=True)
    assert asked.stdout == "taken over\n", asked


WITH_ANOTHER_CLOCK = """
import runpy, sys, time
clock, shift = time.time, float(sys.argv[1])
time.time = lambda: clock() + shift
sys.argv[:2] = []
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.timeout(1800)
@pytest.mark.slow(reason="four commands on three hosts")
def test_a_host_that_loses_power_is_replaced_by_another(tmp_path):
    """One host dies within a training; the other, whose clock is ten minutes behind, resumes it."""
    config, whole, shared = (
        CONFIG.replace("epochs: 2", "epochs: 40"),
        tmp_path / "a",
        tmp_path / "b",
    )
    for folder in (whole, shared):
        folder.mkdir()
        (folder / "config.yaml").write_text(config)
    subprocess.run(COMMAND, cwd=whole, check=True, capture_output=True, timeout=560)
    first = subprocess.Popen(
        [*another_host("node1"), *COMMAND], cwd=shared, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 560
        while not list(shared.rglob("resume/epoch_002.pt")):
            assert first.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        first.kill()
        first.wait()
    (claim,) = shared.rglob("claim.json")
    second = [
        *another_host("node2"),
        sys.executable,
        "-c",
        WITH_ANOTHER_CLOCK,
        "-600",
        *COMMAND[1:],
    ]
    asked = subprocess.run(second, cwd=shared, capture_output=True, text=True, timeout=560)
    assert asked.returncode == 1, asked.stderr
    assert "held by process 1 on node1" in asked.stderr.splitlines()[-1]
    long_ago = time.time() - 200
    os.utime(claim, (long_ago, long_ago))
    done = subprocess.run(second, cwd=shared, capture_output=True, text=True, timeout=560)
    assert done.returncode == 0, done.stderr
    assert tables(shared) == tables(whole)
    assert not list(shared.rglob("claim.json*"))
