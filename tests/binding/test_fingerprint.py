"""Which model file it is, and which model, whatever its weights were rounded to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import pytest

from kvp_edge.binding.fingerprint import model_fingerprint, model_identity
from kvp_edge.errors import UnsupportedModelError
from makers.gguf_models import ModelShape, write_model
from support.quantised import quantise

TYPES = [
    llama_cpp.LLAMA_FTYPE_ALL_F32,
    llama_cpp.LLAMA_FTYPE_MOSTLY_F16,
    llama_cpp.LLAMA_FTYPE_MOSTLY_BF16,
    llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
    llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
]
#: Norms of blocks; with biases; with norms of heads.
SHAPES = [ModelShape(), ModelShape("qwen2"), ModelShape("qwen3")]


def test_fingerprints_tell_files_apart(tmp_path: Path) -> None:
    paths = {name: tmp_path / f"{name}.gguf" for name in ("a", "same", "other", "f16")}
    write_model(paths["a"], ModelShape())
    write_model(paths["same"], ModelShape())
    write_model(paths["other"], ModelShape(seed=1))
    write_model(paths["f16"], ModelShape(weight_type="f16"))
    prints = {name: model_fingerprint(path) for name, path in paths.items()}
    assert prints["a"] == prints["same"]
    assert len({*prints.values()}) == 3
    assert len(prints["a"]) == 64


@pytest.mark.parametrize("of", [model_fingerprint, model_identity])
def test_a_damaged_file_has_neither(of: Callable[[Path], str], tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_model(path, ModelShape())
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UnsupportedModelError, match="cannot be read as a GGUF file"):
        of(path)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.arch)
def test_all_quantisations_of_a_model_have_one_identity(shape: ModelShape, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_model(path, shape)
    made = [quantise(path, tmp_path / f"{ftype}.gguf", ftype) for ftype in TYPES]
    again = quantise(made[-1], tmp_path / "again.gguf", llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0)
    identities = {model_identity(one) for one in (path, *made, again)}
    assert len(identities) == 1
    assert len(identities.pop()) == 64
    assert len({model_fingerprint(one) for one in (*made, again)}) == len(TYPES) + 1


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.arch)
def test_another_model_of_the_same_shape_has_another_identity(
    shape: ModelShape, tmp_path: Path
) -> None:
    """Also if it differs in one number of one norm."""
    path = tmp_path / "model.gguf"
    weights = write_model(path, shape)
    identity = model_identity(path)
    data = path.read_bytes()
    for name in ("blk.0.attn_norm.weight", f"blk.{shape.n_layer - 1}.ffn_norm.weight"):
        number = weights[name][-1:].tobytes()
        assert data.count(number) == 1
        path.write_bytes(data.replace(number, np.float32(0.5).tobytes()))
        assert model_identity(path) != identity


def test_a_model_with_the_same_norms_and_other_matrices_has_the_same_identity(
    tmp_path: Path,
) -> None:
    """As a fine-tune with LoRA that was merged into its base model."""
    path = tmp_path / "model.gguf"
    weights = write_model(path, ModelShape())
    before = model_identity(path), model_fingerprint(path)
    start = weights["blk.1.attn_q.weight"][0, :4].tobytes()
    data = path.read_bytes()
    assert data.count(start) == 1
    path.write_bytes(data.replace(start, np.ones(4, np.float32).tobytes()))
    assert model_identity(path) == before[0]
    assert model_fingerprint(path) != before[1]


def test_what_a_converter_or_quantiser_adds_does_not_count(tmp_path: Path) -> None:
    plain, more = tmp_path / "plain.gguf", tmp_path / "more.gguf"

    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_string("quantize.imatrix.file", "imatrix.dat")
        writer.add_tensor("rope_freqs.weight", np.ones(16, np.float32))
        writer.add_tensor("blk.0.rope_freqs.weight", np.ones(16, np.float32))
        writer.add_tensor("blk.0.attn_q.scale", np.ones(1, np.float32))

    write_model(plain, ModelShape())
    write_model(more, ModelShape(), add)
    assert model_identity(more) == model_identity(plain)


def copy(path: Path, to: Path, change: Callable[[str, Any], Any], **how: Any) -> None:
    """A copy of a model file, its tensors changed by name."""
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(to, reader.fields["general.architecture"].contents(), **how)
    for key, field in reader.fields.items():
        if not key.startswith(("GGUF.", "general.architecture")):
            writer.add_key_value(
                key,
                field.contents(),
                field.types[0],
                field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None,
            )
    for tensor in reversed(reader.tensors):
        writer.add_tensor(tensor.name, change(tensor.name, np.array(tensor.data)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_the_parts_of_a_split_model_and_their_order_do_not_count(tmp_path: Path) -> None:
    path = tmp_path / "whole.gguf"
    write_model(path, ModelShape())
    copy(path, tmp_path / "parts.gguf", lambda name, data: data, split_max_tensors=4)
    parts = sorted(tmp_path.glob("parts-*.gguf"))
    assert len(parts) > 2
    assert model_identity(parts[0]) == model_identity(path)
    alone = parts[0].rename(tmp_path / "alone-00001-of-00006.gguf")
    assert model_identity(alone) != model_identity(path)


def test_norms_that_were_never_trained_tell_nothing(tmp_path: Path) -> None:
    path, flat = tmp_path / "model.gguf", tmp_path / "flat.gguf"
    write_model(path, ModelShape())
    copy(path, flat, lambda name, data: np.ones_like(data) if "norm" in name else data)
    assert model_identity(flat) == ""
