"""Kinds of figures: numbers in the paper, file name, source table, and what to see in each."""

from collections.abc import Callable
from dataclasses import dataclass

from matplotlib.figure import Figure

from gradient_accounting import ACCOUNTS
from plotting.families import Family

OF_ANY_MODEL = r"data\.noise_rate|(model|train)\..+"
OF_ANY_DATA = r"(data\.(?!split)|train\.).+"


@dataclass(frozen=True)
class FigureKind:
    """A kind of figure: its numbers in the paper, its file, and what it is made from."""

    numbers: tuple[str, ...]
    name: str
    experiment: str
    source: str  # the result file that it needs
    plot: Callable[..., Figure]  # of a family, or of several at once
    subject: str  # the first words of its caption
    see: str  # what to see in it, in one sentence
    compares: str | None = None  # settings in which the families of one figure may differ
    page: int = 8  # families on a figure that compares them, at most
    beyond: bool = False  # not in the paper: drawn where it was measured, not asked for elsewhere
    atypical: bool | None = None  # True: of an atypical split only; False: of any other split

    def fits(self, family: Family) -> bool:
        """Return True if the figure is defined for the family's kind of memorized examples."""
        return self.atypical in (None, family.config.data.split == "atypical")

    def concerns(self, family: Family) -> bool:
        """Return True if a family of runs can have this figure."""
        if not self.fits(family):
            return False
        if self.beyond:
            return family.having(self.source) is not None
        kind = family.config.dropout.kind
        if self.experiment == "dropout":
            return kind == "example_tied"
        return kind == "none" or self.source == "history.csv"

    def comes_from(self, family: Family) -> bool:
        """Return True if a script makes the table that a family lacks for this figure."""
        accounted = family.config.train.account_gradients or self.source != ACCOUNTS.name
        return (self.beyond or self.concerns(family)) and accounted
