"""Preconditions of the claims: the conditions under which a measurement can test a claim."""

from collections.abc import Callable

from engine.runs.run import Run
from engine.runs.tables import HISTORY
from example_tied_dropout import DROPOUT
from neuron_flipping import FLIPPING
from plotting.families import Family

FITTED, SEARCHED = 0.8, 20

Precondition = Callable[[Run], str]  # the reason why a claim does not apply to a run, or ''


def require_fitted(run: Run) -> str:
    """Require that the final network predicts most labels of the memorized set."""
    return _compare(HISTORY.read(run.directory)[-1]["acc_noisy"])


def require_fitted_with_dropout(run: Run) -> str:
    """Require that the network with all its neurons, before dropping, predicts most labels."""
    rows = DROPOUT.read(run.directory)
    return _compare(next(row["acc_noisy"] for row in rows if row["state"] == "before"))


def require_searched(run: Run) -> str:
    """Require a fitted memorized set, and enough searched examples of either kind."""
    if reason := require_fitted(run):
        return reason
    memorized = [row["memorized"] for row in FLIPPING.read(run.directory)]
    noisy = sum(value == 1 for value in memorized)
    fewest = min(noisy, len(memorized) - noisy)
    if fewest < SEARCHED:
        return f"{fewest} searched examples of one kind, fewer than {SEARCHED}"
    return ""


def _compare(accuracy: float) -> str:
    if accuracy >= FITTED:
        return ""
    return f"{accuracy:.0%} of the memorized set is fitted, less than {FITTED:.0%}"


BY_EXPERIMENT: dict[str, Precondition] = {
    "gradients": require_fitted,
    "rewinding": require_fitted,
    "retraining": require_fitted,
    "atypical": require_fitted,
    "flipping": require_searched,
}
TIED = {
    "dropout.after_clean", "dropout.after_noisy", "dropout.gap", "dropout.forgotten",
    "dropout.clean_over_p_gen", "dropout.noisy_over_p_gen",
}  # fmt: skip


def precondition_of(name: str) -> Precondition | None:
    """Return the precondition of a claim; None where the claim is about fitting itself."""
    if name in TIED:
        return require_fitted_with_dropout
    return BY_EXPERIMENT.get(name.partition(".")[0])


def explain_not_applicable(name: str, family: Family) -> str:
    """Return the reason of the first seed to which a claim does not apply, or ''."""
    precondition = precondition_of(name)
    for run in family.runs if precondition else ():
        if reason := precondition(run):
            return f"seed {run.config.seed}: {reason}"
    return ""
