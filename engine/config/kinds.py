"""One configuration key: its default, its meaning, and which values it takes.

`engine/config/schema.py` declares every key with `option(default, kind, meaning)`. A `Kind` turns
a value from YAML into the value that the program uses, and says in words what is allowed.
"""

import difflib
import math
from collections.abc import Callable, Iterable
from dataclasses import Field, dataclass, field
from itertools import pairwise

FLOAT32_MAX = 3.4028234e38  # networks compute with no larger number
ELLIPSIS = "..."  # at the end of a list of epochs: continue it


@dataclass(frozen=True)
class Kind:
    """A set of allowed values, in words and as a function that raises ValueError for others."""

    allowed: str
    parse: Callable[[object], object]
    choices: tuple[str, ...] = ()


def option(default: object, kind: Kind, meaning: str) -> Field:
    """Declare a dataclass field that can be validated and documented."""
    return field(default=default, metadata={"kind": kind, "meaning": meaning})


def nearest(word: object, words: Iterable[str]) -> str:
    """Return '; did you mean X?' for the closest spelling, or nothing if none is close."""
    close = difflib.get_close_matches(str(word), list(words), n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def _require(condition: bool) -> None:
    if not condition:
        raise ValueError


def _in_range(value: float, least: float | None, most: float | None, above: float | None) -> bool:
    return (
        math.isfinite(value)
        and (least is None or value >= least)
        and (most is None or value <= most)
        and (above is None or value > above)
    )


def _range_words(least: float | None, most: float | None, above: float | None) -> str:
    if least is not None and most is not None:
        return f" from {least} to {most}"
    if above is not None:
        return f" above {above}" + (f", {most} at the most" if most is not None else "")
    return f", {least} or more" if least is not None else ""


def integer(least: int | None = None, most: int | None = None) -> Kind:
    def parse(value: object) -> int:
        # YAML's true is Python's True, which is an int.
        _require(isinstance(value, int) and not isinstance(value, bool))
        _require(_in_range(value, least, most, None))
        return value

    return Kind("a whole number" + _range_words(least, most, None), parse)


def number(
    least: float | None = None, most: float | None = None, above: float | None = None
) -> Kind:
    def parse(value: object) -> float:
        _require(isinstance(value, (int, float)) and not isinstance(value, bool))
        _require(_in_range(value, least, most, above) and abs(value) <= FLOAT32_MAX)
        return float(value) + 0.0  # no -0.0, which is written in another way than 0

    return Kind("a number" + _range_words(least, most, above), parse)


def flag(*words: str) -> Kind:
    """Return the kind of true, false, and these words."""

    def parse(value: object) -> bool | str:
        _require(isinstance(value, bool) or (isinstance(value, str) and value in words))
        return value

    return Kind(", ".join((*words, "true or false")), parse)


def one_of(*choices: str) -> Kind:
    def parse(value: object) -> str:
        _require(isinstance(value, str) and value in choices)
        return value

    return Kind("one of " + ", ".join(choices), parse, choices)


def one_of_or(choices: Iterable[str], others: Callable[[str], bool], words: str) -> Kind:
    """One of the choices, or any text that `others` accepts: `words` says which."""

    def parse(value: object) -> str:
        _require(isinstance(value, str) and value.isprintable())
        _require(value in choices or others(value))
        return value

    choices = tuple(choices)
    return Kind(f"one of {', '.join(choices)}, {words}", parse, choices)


def some_of(*choices: str) -> Kind:
    """Allow 'all', or a list of some of the choices, kept in the order of the choices."""

    def parse(value: object) -> str | tuple[str, ...]:
        if value == "all":
            return "all"
        _require(isinstance(value, (list, tuple)) and all(item in choices for item in value))
        return tuple(choice for choice in choices if choice in value)

    allowed = f"all, or a list of some of {', '.join(choices)}"
    return Kind(allowed, parse, ("all", *choices))


def text() -> Kind:
    def parse(value: object) -> str:
        _require(isinstance(value, str) and bool(value.strip()) and value.isprintable())
        return value

    return Kind("text on one line", parse)


def epochs(open_ended: bool = False) -> Kind:
    """Allow 'all', or a list of epochs, kept sorted and without repeats.

    An open-ended list may end with '...' and then continues in steps to the last epoch.
    """

    def parse(value: object) -> str | tuple[int | str, ...]:
        if value == "all":
            return "all"
        _require(isinstance(value, (list, tuple)) and len(value) > 0)
        listed, rest = list(value), ()
        if open_ended and listed[-1] == ELLIPSIS:
            listed, rest = listed[:-1], (ELLIPSIS,)
        _require(all(type(epoch) is int and epoch >= 0 for epoch in listed))
        if rest:
            steps = {b - a for a, b in pairwise(listed)}
            _require(len(steps) == 1 and min(steps) > 0)
        return tuple(sorted(set(listed))) + rest

    example = "[0, 5, 10] or [0, 5, ...]" if open_ended else "[0, 5, 10]"
    return Kind(f"all, or a list of epochs such as {example}", parse, ("all",))


def listed_epochs(value: str | tuple[int | str, ...], last: int) -> list[int]:
    """List the epochs that a value of the kind `epochs` means, in a training of `last` epochs."""
    if value == "all":
        return list(range(last + 1))
    if value[-1] != ELLIPSIS:
        return list(value)
    first, second = value[:2]
    return sorted({*range(first, last + 1, second - first), last})


def integers(least: int) -> Kind:
    """Allow a list of different whole numbers, kept as a tuple in its order."""

    def parse(value: object) -> tuple[int, ...]:
        _require(isinstance(value, (list, tuple)) and len(value) > 0)
        _require(all(type(item) is int and item >= least for item in value))
        _require(len(set(value)) == len(value))
        return tuple(value)

    return Kind(f"a list of different whole numbers, {least} or more each", parse)


def bounds(most: int | None = None) -> Kind:
    """Allow ascending whole numbers, kept as a tuple: the bounds of windows side by side."""

    def parse(value: object) -> tuple[int, ...]:
        _require(isinstance(value, (list, tuple)) and 2 <= len(value) <= (most or len(value)))
        _require(all(type(item) is int and item >= 0 for item in value))
        _require(all(a < b for a, b in pairwise(value)))
        return tuple(value)

    example = "two ascending epochs such as [15, 20]"
    return Kind(example if most == 2 else "a list of ascending epochs such as [0, 5, 10]", parse)


def names(*words: str) -> Kind:
    """One of the words, or a list of different names, kept as a tuple in its order."""

    def parse(value: object) -> str | tuple[str, ...]:
        if isinstance(value, str) and value in words:
            return value
        _require(isinstance(value, (list, tuple)) and len(value) > 0)
        # YAML reads the name of a Sequential's child, such as 0, as a number.
        _require(all(type(item) in (str, int) and str(item).isprintable() for item in value))
        found = tuple(map(str, value))
        _require(len(set(found)) == len(found) and all(name.strip() for name in found))
        return found

    listed = "a list of different names"
    return Kind(f"one of {', '.join(words)}, or {listed}" if words else listed, parse, words)


class Options(dict):
    """Names and plain values; hashable, as the configuration that holds them is a key of caches."""

    def __hash__(self) -> int:
        return hash(tuple(self))


def mapping() -> Kind:
    """Names and plain values, such as {groups: 4}, in the order of the names."""

    def plain(value: object) -> bool:
        if isinstance(value, (list, tuple)):
            return all(map(plain, value))
        return value is None or isinstance(value, (bool, int, float, str))

    def parse(value: object) -> Options:
        _require(isinstance(value, dict))
        _require(all(isinstance(key, str) and key.isidentifier() for key in value))
        _require(all(map(plain, value.values())))
        return Options(sorted(value.items()))

    return Kind("names and plain values, such as {groups: 4}", parse)


def optional(kind: Kind) -> Kind:
    def parse(value: object) -> object:
        return None if value is None else kind.parse(value)

    return Kind(f"{kind.allowed}, or null", parse, kind.choices)
