"""What can go wrong, and how it is told."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import kvp_edge
from kvp_edge import errors
from support.cli_options import all_options

PACKAGE = Path(kvp_edge.__file__).parent
CLASSES = [one for _, one in inspect.getmembers(errors, inspect.isclass)]

#: Of other programs, with a word of the sentence that says whose they are.
FOREIGN = {
    "--force-reinstall": "pip install",
    "--no-deps": "pip install",
    "--no-cache-dir": "pip install",
    "--merge": "llama-gguf-split",
    "--nproc-per-node": "torchrun",
}


def test_every_error_is_a_kvp_error_and_exported() -> None:
    assert len(CLASSES) > 10
    for one in CLASSES:
        assert issubclass(one, kvp_edge.KVPError)
        assert one.__name__ in kvp_edge.__all__
        assert getattr(kvp_edge, one.__name__) is one


def test_every_error_is_one_that_python_knows() -> None:
    for one in set(CLASSES) - {errors.KVPError}:
        assert issubclass(one, ValueError) != issubclass(one, RuntimeError)


def test_errors_of_the_package_are_defined_in_one_place() -> None:
    """Those elsewhere begin with "_", or are caught where they are raised; the server's become
    answers."""
    caught_inside = {"NotTried", "Ended"}
    for path, node in _nodes():
        if path.name == "errors.py" or "server" in path.parts or not isinstance(node, ast.ClassDef):
            continue
        bases = {base.id for base in node.bases if isinstance(base, ast.Name)}
        is_error = any(base.endswith(("Error", "Exception")) for base in bases)
        assert not is_error or node.name.startswith("_") or node.name in caught_inside, node.name


def test_llama_lists_what_it_raises() -> None:
    raises = inspect.getdoc(kvp_edge.Llama)
    assert raises is not None
    raises = raises[raises.index("Raises:") :]
    for one in set(CLASSES) - {errors.TraceError, errors.TrainingError, errors.RecordError}:
        assert one.__name__ in raises, one


def test_options_named_in_messages_exist() -> None:
    known = all_options()
    assert {"--kv-budget", "--budgets", "--version"} <= known
    named = {(path, option, text) for path, text in _texts() for option in options_in(text)}
    assert len(named) > 50
    for path, option, text in named:
        if option in FOREIGN:
            assert FOREIGN[option] in text, (path, text)
        else:
            assert option in known, (path, option)


def options_in(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", text))


def _nodes() -> Iterator[tuple[Path, ast.AST]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            yield path, node


def _texts() -> Iterator[tuple[Path, str]]:
    """Every text in the package's code, f-strings as a whole."""
    for path, node in _nodes():
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield path, node.value
        elif isinstance(node, ast.JoinedStr):
            parts = (one.value for one in node.values if isinstance(one, ast.Constant))
            yield path, " ".join(map(str, parts))
