"""Docstrings begin with a verb or name a thing."""

import ast
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
FOLDERS = ("benchmarks", "beyond", "data", "engine", "models", "plotting", "tests")
HEADLESS = {
    "As", "From", "How", "Of", "What", "When", "Where", "Whether", "Which", "Who", "Whose",
}  # fmt: skip
FILES = sorted(
    [path for folder in FOLDERS for path in (REPOSITORY / folder).rglob("*.py")]
    + list(REPOSITORY.glob("*.py"))
)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_docstrings_have_a_head(path):
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, documented)]
    first = [text.split()[0] for node in nodes if (text := ast.get_docstring(node))]
    assert not HEADLESS.intersection(word.strip("'\"`,:") for word in first)
