"""GGUF files read without believing their lengths; against the package gguf where it reads them."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from kvp_edge.files import open_regular
from kvp_edge.files.gguf_file import GGUFFile
from makers.gguf_models import ModelShape

UINT8, UINT32, STRING, ARRAY, UINT64 = 0, 4, 8, 9, 10


def key(name: str, kind: int, payload: bytes) -> bytes:
    return struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", kind) + payload


def read(path: Path, *keys: bytes, tensors: bytes = b"", n_tensors: int = 0) -> GGUFFile:
    head = struct.pack("<4sIQQ", b"GGUF", 3, n_tensors, len(keys))
    path.write_bytes(head + b"".join(keys) + tensors)
    with open_regular(path) as file:
        return GGUFFile(file)


def test_it_is_what_the_package_gguf_reads(
    bundled_model: str, random_model: Callable[[ModelShape], Any]
) -> None:
    folder = Path(bundled_model).parent
    for path in (*folder.glob("*.gguf"), Path(random_model(ModelShape("llama")).path)):
        theirs = gguf.GGUFReader(path)
        with open_regular(path) as file:
            ours = GGUFFile(file)
            fields = {k: v for k, v in theirs.fields.items() if not k.startswith("GGUF.")}
            assert ours.values.keys() == fields.keys()
            for name, value in ours.values.items():
                if value is None:
                    assert len(fields[name].data) > 1024
                else:
                    assert value == fields[name].contents()
            assert ours.tensors.keys() == {tensor.name for tensor in theirs.tensors}
            for tensor in theirs.tensors:
                expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
                shape = tuple(int(n) for n in reversed(tensor.shape))
                np.testing.assert_array_equal(
                    ours.data(ours.tensors[tensor.name]), expected.reshape(shape)
                )


@pytest.mark.parametrize("n", [2**24, 2**40, 2**63, 2**64 - 1])
@pytest.mark.parametrize("kind", [UINT8, UINT32, UINT64, STRING, ARRAY, 99])
def test_an_array_that_is_longer_than_the_file_is_refused_at_once(
    tmp_path: Path, kind: int, n: int
) -> None:
    with pytest.raises(ValueError, match="cut short|unknown type|strings, more than"):
        read(tmp_path / "f", key("z", ARRAY, struct.pack("<IQ", kind, n)))


def test_what_is_said_of_a_file_with_holes_takes_no_memory_and_no_time(tmp_path: Path) -> None:
    """2^40 bytes do follow, but nobody has written them."""

    def refuses(data: bytes) -> str:
        (tmp_path / "f").write_bytes(data)
        with open(tmp_path / "f", "r+b") as file:
            file.truncate(2**40)
        with open_regular(tmp_path / "f") as file, pytest.raises(ValueError, match="it ") as error:
            GGUFFile(file)
        return str(error.value)

    def head(n_tensors: int, n_keys: int) -> bytes:
        return struct.pack("<4sIQQ", b"GGUF", 3, n_tensors, n_keys)

    array = struct.pack("<IQ", STRING, 2**36)
    assert "keys" in refuses(head(0, 2**30))
    assert "tensors" in refuses(head(2**30, 0))
    assert "bytes of strings" in refuses(head(0, 1) + struct.pack("<Q", 2**39))
    assert "bytes of strings" in refuses(head(0, 1) + key("z", STRING, struct.pack("<Q", 2**39)))
    assert "strings" in refuses(head(0, 1) + key("z", ARRAY, array))
    assert "the key '' twice" in refuses(head(0, 1000) + key("z", UINT8, b"\0"))


def test_long_arrays_are_passed_over_and_short_ones_are_kept(tmp_path: Path) -> None:
    def array(n: int) -> bytes:
        return struct.pack("<IQ", UINT8, n) + bytes(n)

    found = read(tmp_path / "f", key("a", ARRAY, array(1024)), key("b", ARRAY, array(1025)))
    assert found.values == {"a": [0] * 1024, "b": None}


def tensor(name: str, dims: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    numbers = struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)
    return struct.pack("<Q", len(name)) + name.encode() + numbers


@pytest.mark.parametrize(
    ("described", "says"),
    [
        (tensor("t", (2**40,)), "its tensor 't' ends beyond it"),
        (tensor("t", (2**32, 2**32, 2**32)), "its tensor 't' ends beyond it"),
        (tensor("t", (4,), offset=2**63), "its tensor 't' ends beyond it"),
        (tensor("t", (8,)), "its tensor 't' ends beyond it"),  # 7 numbers follow
        (tensor("t", (4,), kind=77), "unknown type 77"),
        (tensor("t", (33,), kind=8), "not whole blocks"),
        (tensor("t", ()), "has 0 dimensions"),
        (tensor("t", (1,) * 5), "has 5 dimensions"),
        (tensor("t", (1,)) * 2, "the tensor 't' twice"),
    ],
)
def test_a_tensor_that_cannot_be_is_refused(tmp_path: Path, described: bytes, says: str) -> None:
    data = bytes(-(24 + len(described)) % 32 + 28)
    with pytest.raises(ValueError, match=says):
        read(tmp_path / "f", tensors=described + data, n_tensors=2 if "twice" in says else 1)


def test_a_tensor_that_ends_with_the_file_is_read(tmp_path: Path) -> None:
    described = tensor("t", (7,))
    data = bytes(-(24 + len(described)) % 32) + np.arange(7, dtype="f").tobytes()
    found = read(tmp_path / "f", tensors=described + data, n_tensors=1)
    with open_regular(tmp_path / "f") as file:
        again = GGUFFile(file)
        assert found.tensors == again.tensors
        assert again.data(again.tensors["t"]).tolist() == [0, 1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "cut short"),
        (b"GGU", "cut short"),
        (b"GGML" + bytes(20), "does not begin with GGUF"),
        (struct.pack("<4sIQQ", b"GGUF", 1, 0, 0), "version 1"),
        (struct.pack(">4sIQQ", b"GGUF", 3, 0, 0), "version 50331648"),
        (struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + key("z", 13, b""), "unknown type 13"),
        (struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + b"\1" + bytes(7) + b"\xff", "codec"),
    ],
)
def test_what_is_no_gguf_is_refused(tmp_path: Path, data: bytes, says: str) -> None:
    (tmp_path / "f").write_bytes(data)
    with open_regular(tmp_path / "f") as file, pytest.raises(ValueError, match=says):
        GGUFFile(file)


@pytest.mark.parametrize("alignment", [0, 3, 2**31 + 1])
def test_an_alignment_that_is_no_power_of_two_is_refused(tmp_path: Path, alignment: int) -> None:
    value = key("general.alignment", UINT32, struct.pack("<I", alignment))
    with pytest.raises(ValueError, match=f"general.alignment is {alignment}"):
        read(tmp_path / "f", value)
