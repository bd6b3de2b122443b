"""kvp_edge.binding against native/kvp_edge.h, the only source of functions and structs."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvp_edge.binding import library, rules, structs
from support.interrupt import interrupted

HEADER = Path(__file__).parents[2] / "native" / "kvp_edge.h"

#: The C name of every ctypes type that a field or an argument may have.
C_NAMES: dict[Any, str] = {
    ctypes.c_int32: "int32_t",
    ctypes.c_uint8: "uint8_t",
    ctypes.c_uint32: "uint32_t",
    ctypes.c_uint64: "uint64_t",
    ctypes.c_float: "float",
    ctypes.c_double: "double",
    ctypes.c_char: "char",
    ctypes.c_char_p: "char *",
    ctypes.c_void_p: "kvp_eval_callback",
    None: "void",
    structs.Error: "kvp_error",
    structs.PolicyPointer: "kvp_policy *",
}


def text() -> str:
    """The header without comments, preprocessor lines and the words that change no type."""
    found = re.sub(r"/\*.*?\*/", " ", HEADER.read_text(), flags=re.DOTALL)
    found = re.sub(r"^\s*#.*$", "", found, flags=re.MULTILINE)
    found = re.sub(r"\b(const|KVP_API)\b", " ", found)
    for alias, meant in re.findall(r"typedef\s+(u?int32_t)\s+(\w+);", found):
        found = re.sub(rf"\b{meant}\b", alias, found)
    return found


def split(declaration: str) -> tuple[str, str]:
    """("float *", "keys") of "float * keys"."""
    kind, name = re.fullmatch(r"\s*(.*?)\s*(\w+)\s*", declaration, re.DOTALL).groups()  # type: ignore[union-attr]
    return re.sub(r"\s+", " ", kind), name


def prototypes() -> dict[str, tuple[str, list[str]]]:
    """What each function of the header returns, and its arguments."""
    found = {}
    for returned, name, arguments in re.findall(
        r"^([\w ]+?\*?)\s*\b(kvp_\w+)\(([^;{}]*)\);", text(), flags=re.MULTILINE
    ):
        args = [] if arguments.strip() == "void" else arguments.split(",")
        found[name] = (returned.strip(), [split(a)[0] for a in args])
    return found


def fields_of(body: str, members: dict[str, str]) -> Iterator[tuple[str, str, str]]:
    """(path, type, length of an array or "") of every field, those of structs in it included."""
    for part in filter(str.strip, re.split(r";\s*(?![^{}]*\})", body)):
        union = re.fullmatch(r"\s*union\s*\{(.*)\}\s*(\w+)\s*", part, re.DOTALL)
        if union is not None:
            for path, kind, length in fields_of(union[1], members):
                yield f"{union[2]}.{path}", kind, length
            continue
        declared, length = re.fullmatch(r"(.*?)(?:\[(\w+)\])?\s*", part, re.DOTALL).groups()  # type: ignore[union-attr]
        kind, name = split(declared)
        if kind in members:
            for path, inner, inner_length in fields_of(members[kind], members):
                yield f"{name}.{path}", inner, inner_length
        else:
            yield name, kind, length or ""


def header_structs() -> dict[str, list[tuple[str, str, str]]]:
    bodies = {
        name: body
        for name, body in re.findall(
            r"typedef struct (\w+) \{((?:[^{}]|\{[^{}]*\})*)\}\s*\1;", text()
        )
    }
    return {name: list(fields_of(body, bodies)) for name, body in bodies.items()}


def our_structs() -> dict[str, type[ctypes.Structure]]:
    """By the name in the header, with which their docstrings begin."""
    found = {}
    for kind in vars(structs).values():
        if (
            isinstance(kind, type)
            and issubclass(kind, ctypes.Structure)
            and kind is not structs.Struct
        ):
            assert kind.__doc__ is not None
            found[re.match(r"kvp_\w+", kind.__doc__)[0]] = kind  # type: ignore[index]
    return found


def our_fields(kind: Any, path: str = "", at: int = 0) -> Iterator[tuple[str, Any, int]]:
    """(path, ctypes type, offset) of every field, those of structs in it included."""
    for name, of in kind._fields_:
        where = at + getattr(kind, name).offset
        full = f"{path}{name.removeprefix('_')}"
        if issubclass(of, (ctypes.Structure, ctypes.Union)):
            yield from our_fields(of, f"{full}.", where)
        else:
            yield full, of, where


def c_type(of: Any) -> tuple[str, int]:
    """The C name of a ctypes type, and how many of them an array holds (1: it is none)."""
    if isinstance(of, library._Argument):
        return of.c, 1
    if hasattr(of, "_length_"):
        return C_NAMES[of._type_], of._length_
    if hasattr(of, "contents"):
        return f"{C_NAMES[of._type_]} *", 1
    return C_NAMES[of], 1


def test_every_function_has_the_headers_arguments_and_result() -> None:
    ours = {
        **{name: ("int32_t", [*args, library._ERROR]) for name, args in library._CALLS.items()},
        **{name: (C_NAMES[back], args) for name, (back, args) in library._OTHERS.items()},
    }
    found = {name: (back, [c_type(a)[0] for a in args]) for name, (back, args) in ours.items()}
    found.update({free: ("void", [f"{kind} *"]) for kind, free in library._FREES.items()})
    assert found == prototypes()


def test_every_struct_has_the_headers_fields() -> None:
    constants = {"KVP_MAX_LAYERS": structs.MAX_LAYERS}
    want = {
        name: [
            (path, kind, constants.get(length) or int(length or 1)) for path, kind, length in fields
        ]
        for name, fields in header_structs().items()
    }
    found = {
        name: [(path, *c_type(of)) for path, of, _ in our_fields(kind)]
        for name, kind in our_structs().items()
    }
    assert found == want


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """What a C compiler says of the header: sizes, offsets ("kvp_error.code") and constants."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("needs a C compiler")
    lines = [
        *(f"sizeof({name})" for name in header_structs()),
        *(
            f"offsetof({name}, {f})"
            for name, fields in header_structs().items()
            for f, *_ in fields
        ),
        *re.findall(r"\b(KVP_[A-Z_]+)\s+=", HEADER.read_text()),
        "KVP_ABI_VERSION",
        "KVP_MAX_LAYERS",
    ]
    folder = tmp_path_factory.mktemp("header")
    printed = "\n".join(f'printf("%s=%lld\\n", "{x}", (long long) ({x}));' for x in lines)
    source = f'#include "kvp_edge.h"\n#include <stdio.h>\nint main(void) {{ {printed} return 0; }}'
    (folder / "layout.c").write_text(source)
    strict = ["-std=c11", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-I", str(HEADER.parent)]
    program = str(folder / "layout")
    subprocess.run([compiler, *strict, "-o", program, str(folder / "layout.c")], check=True)
    out = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    return {name: int(value) for name, value in (line.split("=") for line in out.splitlines())}


def test_every_struct_has_the_compilers_size_and_offsets(compiled: dict[str, int]) -> None:
    found = {f"sizeof({name})": ctypes.sizeof(kind) for name, kind in our_structs().items()}
    for name, kind in our_structs().items():
        for path, _, at in our_fields(kind):
            found[f"offsetof({name}, {path})"] = at
    want = {name: value for name, value in compiled.items() if "(" in name}
    assert found == want


def test_numbers_that_python_repeats_are_the_headers(compiled: dict[str, int]) -> None:
    assert compiled["KVP_ABI_VERSION"] == library._ABI_VERSION
    assert compiled["KVP_MAX_LAYERS"] == structs.MAX_LAYERS
    assert compiled["KVP_NOT_IN_PLACE"] == library._NOT_IN_PLACE
    for code in ("ARGUMENT", "FILE", "UNSUPPORTED", "MEMORY"):
        assert getattr(library, f"_ERR_{code}") == compiled[f"KVP_ERR_{code}"]
    kinds = {kind.__name__: kind.kind for kind in rules.Rule.__subclasses__()}
    names = {"Network": "POLICY"}
    assert {f"KVP_RULE_{names.get(name, name.upper())}": kind for name, kind in kinds.items()} == {
        name: value for name, value in compiled.items() if name.startswith("KVP_RULE_")
    }


def test_arrays_of_another_type_are_refused() -> None:
    unit, flags, keep = np.zeros(3, np.int32), np.zeros(3, np.bool_), np.zeros(3, np.uint8)
    scores = np.zeros((1, 3), np.float32)
    library.call("kvp_choose_tokens", scores, 1, unit, flags, 3, 2, keep)
    for wrong in (scores.astype(np.float64), np.zeros((3, 2), np.float32)[:, 0]):
        with pytest.raises(ctypes.ArgumentError, match="expected a contiguous array of float32"):
            library.call("kvp_choose_tokens", wrong, 1, unit, flags, 3, 2, keep)
    with pytest.raises(ctypes.ArgumentError, match="expected a kvp_capture_plan \\*, not"):
        library.call("kvp_capture_begin", None, structs.RopeShift())
    blocks = [structs.LogBlock(keep, 0, 3, 0), structs.RopeShift()]
    with pytest.raises(ctypes.ArgumentError, match="expected kvp_log_block \\*, not RopeShift"):
        library.call("kvp_cache_fill", None, None, 0, None, blocks, 2, None, None, 0, None)
    with pytest.raises(TypeError, match="expected a contiguous array of int32, not"):
        structs.RopeShift(distance=np.zeros(3, np.int64))


def test_an_interrupt_while_arguments_are_converted_is_an_interrupt() -> None:
    """ctypes makes an ArgumentError of whatever is raised while it has arguments converted."""
    unit, flags, keep = np.zeros(3, np.int32), np.zeros(3, np.bool_), np.zeros(3, np.uint8)
    scores = np.zeros((1, 3), np.float32)

    def call() -> None:
        library.call("kvp_choose_tokens", scores, 1, unit, flags, 3, 2, keep)
        structs.RopeShift(frequency=np.zeros(3), distance=unit)
        library.lib.kvp_queries_size(None)

    moments = next(at for at in range(1000) if not interrupted(call, at))
    assert moments > 10


def test_only_two_modules_of_the_binding_know_ctypes() -> None:
    folder = Path(library.__file__).parent
    knowing = {
        f.name
        for f in folder.glob("*.py")
        if re.search(r"^(import|from) ctypes", f.read_text(), re.MULTILINE)
    }
    assert knowing == {"library.py", "structs.py"}
