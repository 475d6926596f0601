"""Commands and names as messages print them: quoted for a shell, free of control characters."""

import shlex
from collections.abc import Iterable


def shell_command(words: Iterable[object]) -> str:
    """Join words into a command that a person can paste into a shell."""
    return " ".join(map(_quoted, words))


def _quoted(word: object) -> str:
    text = str(word)
    if text.isprintable():
        return shlex.quote(text)
    inner = "".join(
        f"\\{char}" if char in "\\'" else char if char.isprintable() else _escaped(char)
        for char in text
    )
    return f"$'{inner}'"


def _escaped(char: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in char.encode("utf-8", "surrogateescape"))


def printable(text: object) -> str:
    """Replace control characters, which may move a terminal's cursor, by escapes."""
    return "".join(
        char if char.isprintable() or "\udc80" <= char <= "\udcff" else repr(char)[1:-1]
        for char in str(text)
    )
