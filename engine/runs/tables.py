"""Result tables: the CSV files of a run, each declared once and read and written through that."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from engine.runs import files


@dataclass(frozen=True)
class ResultTable:
    """A CSV file in a run's directory: its name, its columns, and those that hold text.

    Tables of earlier versions lack the `added` columns, which are then read as nan.
    """

    name: str
    columns: tuple[str, ...]
    text: tuple[str, ...] = ()
    added: tuple[str, ...] = ()

    def path(self, folder: Path) -> Path:
        return folder / self.name

    def read(self, folder: Path) -> list[dict]:
        """Return the rows of the table in this folder; numbers as floats."""
        return files.read_csv(self.path(folder), self.columns, self.text, self.added)

    def require_whole(self, folder: Path) -> None:
        """Refuse a table that is damaged, another run's, or of other columns."""
        files.read_lines(self.path(folder), self.columns, self.added)

    def write(self, folder: Path, rows: Iterable[Mapping[str, object]]) -> None:
        files.write_csv(self.path(folder), self.columns, rows)

    def update(self, folder: Path, rows: Iterable[Mapping[str, object]]) -> None:
        """Write the table unless it has these rows already."""
        files.update_text(self.path(folder), files.csv_text(self.columns, rows))


LAYERS = ResultTable("layers.csv", ("layer", "name", "parameters"), text=("name",))
DROPOUT_SITES = ResultTable("dropout_sites.csv", ("site", "channels"), text=("site",))
HISTORY = ResultTable(
    "history.csv",
    (
        "epoch", "lr",
        "loss_clean", "loss_noisy", "loss_total", "loss_test",
        "acc_clean", "acc_noisy", "acc_total", "acc_test",
    ),
)  # fmt: skip
