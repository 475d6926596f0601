"""Preconditions of the claims: the conditions under which a measurement can test a claim."""

from collections.abc import Callable

from engine.runs.run import Run
from engine.runs.tables import HISTORY
from example_tied_dropout import DROPOUT
from layer_rewinding import REWINDING
from neuron_flipping import FLIPPING
from plotting.families import Family

FITTED, SEARCHED, APART = 0.8, 20, 0.1

Precondition = Callable[[Run], str]  # the reason why a claim does not apply to a run, or ''


def require_fitted(run: Run) -> str:
    """Require that the final network predicts most labels of the memorized set."""
    return _compare(HISTORY.read(run.directory)[-1]["acc_noisy"])


def require_fitted_with_dropout(run: Run) -> str:
    """Require that the network with all its neurons, before dropping, predicts most labels."""
    rows = DROPOUT.read(run.directory)
    return _compare(next(row["acc_noisy"] for row in rows if row["state"] == "before"))


def require_clean_kept(run: Run) -> str:
    """Require a fitted network with dropout that is right about most clean examples afterwards."""
    if reason := require_fitted_with_dropout(run):
        return reason
    rows = DROPOUT.read(run.directory)
    clean = next(row["acc_clean"] for row in rows if row["state"] == "after")
    if clean >= FITTED:
        return ""
    return f"clean accuracy after dropping is {clean:.0%}, less than {FITTED:.0%}"


def require_layers_apart(run: Run) -> str:
    """Require a fitted memorized set, and layers that differ when reset to initialization."""
    if reason := require_fitted(run):
        return reason
    noisy = [row["acc_noisy"] for row in REWINDING.read(run.directory) if row["epoch"] == 0]
    if not noisy or max(noisy) - min(noisy) >= APART:
        return ""
    return (
        f"with a layer at initialization the accuracy on the memorized set is {min(noisy):.0%} to "
        f"{max(noisy):.0%}, whichever layer it is"
    )


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


BY_NAME: dict[str, Precondition] = {
    "rewinding.not_last": require_layers_apart,
    "rewinding.same_layers": require_layers_apart,
    "atypical.rewinding": require_layers_apart,
    "dropout.gap": require_clean_kept,
} | dict.fromkeys(
    ("dropout.after_clean", "dropout.after_noisy", "dropout.test", "dropout.forgotten",
     "dropout.clean_over_p_gen", "dropout.noisy_over_p_gen"),
    require_fitted_with_dropout,
)  # fmt: skip
BY_EXPERIMENT: dict[str, Precondition] = {
    "gradients": require_fitted,
    "rewinding": require_fitted,
    "retraining": require_fitted,
    "atypical": require_fitted,
    "flipping": require_searched,
}


def precondition_of(name: str) -> Precondition | None:
    """Return the precondition of a claim; None where the claim is about fitting itself."""
    return BY_NAME.get(name) or BY_EXPERIMENT.get(name.partition(".")[0])


def explain_not_applicable(name: str, family: Family) -> str:
    """Return the reason of the first seed to which a claim does not apply, or ''."""
    precondition = precondition_of(name)
    for run in family.runs if precondition else ():
        if reason := precondition(run):
            return f"seed {run.config.seed}: {reason}"
    return ""
