"""Compare two summaries claim by claim: which numbers and verdicts differ."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.config.kinds import FLOAT32_MAX
from engine.errors import UserError
from engine.runs import files

TOLERANCE = 0.01
Entry = Mapping[str, object]


@dataclass(frozen=True)
class Comparison:
    """The lines of a comparison of two summaries, and its counts."""

    lines: tuple[str, ...]
    compared: int
    differing: int

    def __str__(self) -> str:
        return "\n".join(self.lines)


def compare_summaries(first: Path, second: Path, tolerance: float = TOLERANCE) -> Comparison:
    """Compare the claims of two summary.json files; the last line counts.

    Means differ if they are further apart than `tolerance`, multiplied by the larger of them where
    that is above 1: an absolute tolerance for shares and correlations, a relative one for counts.
    """
    pairs = list(_pair(read_claims(first), read_claims(second)))
    lines, alone = [], 0
    for one, other in pairs:
        if one is None or other is None:
            alone += 1
            lines.append(_describe_alone(one or other, first if other is None else second))
        elif changes := _changes(one, other, tolerance):
            lines.append(f"{_name(one, other)}: {'; '.join(changes)}")
    differing, compared = len(lines) - alone, len(pairs) - alone
    lines.append(
        f"{compared} claims compared, {differing} differ (tolerance {tolerance:g}); "
        f"{alone} in one summary only"
    )
    return Comparison(tuple(lines), compared, differing)


def read_claims(path: Path) -> list[Entry]:
    """Read the claims of a summary.json; raise UserError where the file is not one."""
    claims = files.read_json(path).get("claims")
    if not isinstance(claims, list):
        raise _malformed(path, "no list of claims")
    for number, entry in enumerate(claims, start=1):
        if problem := _problem_of(entry):
            raise _malformed(path, f"claim {number}: {problem}")
    return claims


def _malformed(path: Path, problem: str) -> UserError:
    return UserError(f"{path}: is not a summary.json of plot_results.py: {problem}")


def _problem_of(entry: object) -> str:
    if not isinstance(entry, dict):
        return f"{entry!r:.40} is not an object"
    for key in ("claim", "about", "verdict"):
        if not isinstance(entry.get(key), str):
            return f"{key} is not text"
    for key in ("mean", "std", "n"):
        if not _is_number_or_none(value := entry.get(key)):
            return f"{key}: {value!r:.40} is not a number"
    return ""


def _is_number_or_none(value: object) -> bool:
    if value is None:
        return True
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    return plain and abs(value) <= FLOAT32_MAX  # false for nan


def _pair(
    first: Sequence[Entry], second: Sequence[Entry]
) -> Iterator[tuple[Entry | None, Entry | None]]:
    """Pair entries of the same claim about the same runs, then those without any alternative.

    Where each summary has a single other entry of a claim, these two are compared although they
    are about different runs.
    """
    for name in dict.fromkeys(str(entry["claim"]) for entry in (*first, *second)):
        ours = [entry for entry in first if entry["claim"] == name]
        theirs = [entry for entry in second if entry["claim"] == name]
        rest = []
        for entry in ours:
            same = next((other for other in theirs if other["about"] == entry["about"]), None)
            if same is None:
                rest.append(entry)
            else:
                theirs.remove(same)
                yield entry, same
        if len(rest) == len(theirs) == 1:
            yield rest[0], theirs[0]
        else:
            yield from ((entry, None) for entry in rest)
            yield from ((None, entry) for entry in theirs)


def _name(one: Entry, other: Entry) -> str:
    about = dict.fromkeys(str(entry["about"]) for entry in (one, other))
    return f"{one['claim']} ({' | '.join(about)})"


def _describe_alone(entry: Entry, path: Path) -> str:
    return f"{_name(entry, entry)}: only in {path}, {entry['verdict']}"


def _changes(one: Entry, other: Entry, tolerance: float) -> list[str]:
    """Describe the differences of two entries: means beyond the tolerance, verdicts."""
    changes = []
    if not _close(one.get("mean"), other.get("mean"), tolerance):
        changes.append(f"{_number(one)} -> {_number(other)}")
    if one["verdict"] != other["verdict"]:
        changes.append(f"{one['verdict']} -> {other['verdict']}")
    return changes


def _close(a: float | None, b: float | None, tolerance: float) -> bool:
    if a is None or b is None:
        return a is b
    return abs(a - b) <= tolerance * max(1, abs(a), abs(b))


def _number(entry: Entry) -> str:
    """Return 'mean ± std (n = seeds)'."""
    if entry.get("mean") is None:
        return "no number"
    spread = "" if entry.get("std") is None else f" ± {entry['std']:.4g}"
    return f"{entry['mean']:.4g}{spread} (n = {entry.get('n')})"
