"""docs/extending.md as written: its measurement, added to a copy of the tree, runs."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGES = ("beyond", "data", "docs", "engine", "models", "plotting")


@pytest.fixture
def tree(tmp_path) -> Path:
    """A copy of the code, with the files of the page's example."""
    tree = tmp_path / "tree"
    for name in PACKAGES:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(REPOSITORY / name, tree / name, ignore=ignored)
    for path in REPOSITORY.glob("*.*"):
        if path.suffix in (".py", ".md"):
            shutil.copy(path, tree)
    page = (REPOSITORY / "docs" / "extending.md").read_text()
    keys, script, figure = re.findall(r"```python\n(.*?)```", page, re.S)
    (tree / "beyond" / "loss_gap.py").write_text(script)
    (tree / "plotting" / "beyond" / "loss_gap.py").write_text(figure)
    entry = re.search(r'`("loss_gap": "beyond.loss_gap")`', page).group(1)
    field = re.search(r"`(loss_gap: LossGapConfig = .*?)`", page).group(1)
    schema = tree / "engine" / "config" / "schema.py"
    text = schema.read_text()
    for mark, added in (
        ('    "gradients": "gradient_accounting",\n', f"    {entry},\n"),
        ("@dataclass(frozen=True)\nclass SlurmConfig", f"{keys}\n\n"),
        ("    slurm: SlurmConfig =", f"    {field}\n"),
    ):
        assert text.count(mark) == 1
        after = mark.endswith("\n")
        text = text.replace(mark, mark + added if after else added + mark)
    schema.write_text(text)
    return tree


def test_a_measurement_takes_three_files(tree, tiny_file):
    command = [sys.executable, "reproduce.py", str(tiny_file), "experiments=[loss_gap]"]
    done = subprocess.run(
        [*command, "loss_gap.epoch=2"], cwd=tree, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"loss gap: .*: loss gap -?[\d.]+ at epoch 2  ", done.stdout)
    (table,) = tiny_file.parent.glob("runs/*/seed0/loss_gap.csv")
    assert table.read_text().startswith("epoch,gap\n2,")
    assert list(tiny_file.parent.glob("runs/*/figures/loss_gap.png"))
    (report,) = tiny_file.parent.glob("runs/report-*/report.html")
    assert "How much higher is the loss of noisy examples?" in report.read_text()
