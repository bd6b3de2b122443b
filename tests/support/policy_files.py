"""Policy files, altered."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np

#: 49 bytes: one key, an array that is said to have 2^40 numbers.
ARRAY_OF_2_TO_THE_40 = (
    struct.pack("<4sIQQQ", b"GGUF", 3, 0, 1, 1) + b"z" + struct.pack("<IIQ", 9, 0, 2**40)
)


def rewrite(path: Path, out: Path, drop: str = "", **changed: Any) -> Path:
    """A copy of a policy file with keys (``__``: dot) changed, or a key or tensor missing."""
    reader = gguf.GGUFReader(path)
    values = {k: f.contents() for k, f in reader.fields.items()}
    values |= {k.replace("__", "."): v for k, v in changed.items()}
    writer = gguf.GGUFWriter(out, values.pop("general.architecture"))
    for key, value in values.items():
        if key == drop or key.startswith("GGUF."):
            continue
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        else:
            writer.add_uint32(key, int(value))
    for tensor in reader.tensors:
        if tensor.name != drop:
            writer.add_tensor(tensor.name, np.array(tensor.data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out
