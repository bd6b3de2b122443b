"""Types of the cache: who names them gets them, memory chooses them, and bytes are kept to."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import llama_cpp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvp_edge import BudgetError, Llama, OptionError
from kvp_edge.cache import choosing_types
from kvp_edge.cache.limits import CELL_UNIT
from kvp_edge.cache.type_table import Choice, TypeTable
from kvp_edge.cache.types import CACHE_TYPES
from makers.gguf_models import ModelShape
from policies.test_policy_of_model import info_of, model, write  # noqa: F401  # a fixture
from support.properties import examples

Loader = Callable[..., Llama]

#: Bytes of 32 numbers.
BLOCK_BYTES = {
    **{"f32": 128, "f16": 64, "bf16": 64, "q8_0": 34, "q5_1": 24},
    **{"q5_0": 22, "q4_1": 20, "q4_0": 18},
}
#: Of the bundled model: 5 layers of 2 KV heads, with keys and values of 64 numbers.
BLOCKS_PER_CELL = 5 * 2 * 2 * 64 // 32
F16, Q8_0 = llama_cpp.GGML_TYPE_F16, llama_cpp.GGML_TYPE_Q8_0


@pytest.fixture(autouse=True)
def plain_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Always q8_0, whatever the shipped table says by now."""
    made = TypeTable([], "", [], [Choice("q8_0")])
    monkeypatch.setattr(choosing_types, "shipped_table", lambda: made)


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    """q4_0 below a tenth, then q8_0/q4_0 below a quarter, then q8_0."""
    made = TypeTable([], "", [], [Choice("q4_0", 0.1), Choice("q8_0/q4_0", 0.25), Choice("q8_0")])
    monkeypatch.setattr(choosing_types, "shipped_table", lambda: made)


@pytest.fixture
def no_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def kib(n_bytes: int) -> str:
    """So many bytes, exactly, as a budget."""
    return f"{n_bytes / 1024!r}KiB"


def unit_of(keys: str, values: str) -> int:
    """Bytes of as many cells of the bundled model as llama.cpp adds at once."""
    return CELL_UNIT * BLOCKS_PER_CELL // 2 * (BLOCK_BYTES[keys] + BLOCK_BYTES[values])


def test_every_type_is_tried_here() -> None:
    assert BLOCK_BYTES.keys() == set(CACHE_TYPES)


@pytest.mark.parametrize("name", [*CACHE_TYPES, "q8_0/q4_0", "f16/q5_1"])
@examples(4)
@given(data=st.data())
def test_bytes_promised_are_bytes_allocated_to_one_unit_of_cells(
    bundled_model: str, name: str, data: st.DataObject
) -> None:
    keys, _, values = name.partition("/")
    unit = unit_of(keys, values or keys)
    at_the_limit = st.integers(1, 5).flatmap(lambda n: st.sampled_from([n * unit, n * unit - 1]))
    asked = data.draw(at_the_limit | st.integers(unit, 5 * unit), label="bytes")
    how = {"n_ctx": 100_000, "n_threads": 1, "n_threads_batch": 1, "recall": "off"}
    how |= {"policy": "recency", "reserve": 64, "verbose": False, "kv_type": name}
    if asked < unit:
        with pytest.raises(BudgetError, match="is too small"):
            Llama(bundled_model, kv_budget=kib(asked), **how)
        return
    with closing(Llama(bundled_model, kv_budget=kib(asked), **how)) as llm:
        cells = llm.n_cells
        taken = cells // CELL_UNIT * unit
        assert taken <= asked < taken + unit
        assert llm.kv_stats.kv_bytes == taken
        assert abs(llm.reported.cells - taken) <= 0.005 * 2**20 + 1  # two decimals in the log
        assert llm.kv_stats.kv_type == name
        shape = llm.kv.cache.shape  # type: ignore[union-attr]  # learned from llama.cpp's state
        assert shape.bytes_per_cell * CELL_UNIT == unit


def test_a_budget_in_tokens_is_f16(bundled_model: str, load: Loader, no_warning: None) -> None:
    assert load(bundled_model, kv_budget=300).kv_stats.kv_type == "f16"
    assert load(bundled_model, n_ctx=256).kv_stats.kv_type == "f16"


@pytest.mark.parametrize(
    ("share", "types"),
    [
        (0.09, "q4_0"),
        (0.1, "q8_0/q4_0"),
        (0.24, "q8_0/q4_0"),
        (0.25, "q8_0"),
        (0.99, "q8_0"),
        (1.0, "f16"),
    ],
)
def test_memory_is_filled_with_what_the_table_says(
    table: None, no_warning: None, bundled_model: str, load: Loader, share: float, types: str
) -> None:
    """The share is that of a full f16 cache of n_ctx tokens."""
    full = 6400 * BLOCKS_PER_CELL * BLOCK_BYTES["f16"]
    llm = load(bundled_model, n_ctx=6400, kv_budget=kib(round(share * full)))
    assert llm.kv_stats.kv_type == types
    if share == 1:
        assert llm.n_cells == 6400
    llm.eval(list(range(40)))
    assert llm.n_tokens == 40


def test_what_fits_whole_in_f16_stays_f16_and_a_byte_less_does_not(
    bundled_model: str, load: Loader
) -> None:
    whole = unit_of("f16", "f16")
    assert load(bundled_model, n_ctx=256, kv_budget=kib(whole)).kv_stats.kv_type == "f16"
    less = load(bundled_model, n_ctx=256, kv_budget=kib(whole - 1)).kv_stats
    assert (less.kv_type, less.cells) == ("q8_0", 256)


def test_f16_stays_where_smaller_types_make_no_more_cells(bundled_model: str, load: Loader) -> None:
    """Cells come in units of 256."""
    f16, q8_0 = unit_of("f16", "f16"), unit_of("q8_0", "q8_0")
    one = load(bundled_model, n_ctx=9000, kv_budget=kib(2 * q8_0 - 1)).kv_stats
    assert f16 < 2 * q8_0 - 1
    assert (one.kv_type, one.cells) == ("f16", 256)
    two = load(bundled_model, n_ctx=9000, kv_budget=kib(2 * q8_0)).kv_stats
    assert (two.kv_type, two.cells) == ("q8_0", 512)


def test_what_fits_whole_is_counted_in_units_of_cells(bundled_model: str, load: Loader) -> None:
    """257 tokens need 512 cells, for which f16 has no room here."""
    budget = kib(2 * unit_of("q8_0", "q8_0"))
    stats = load(bundled_model, n_ctx=257, kv_budget=budget).kv_stats
    assert (stats.kv_type, stats.cells) == ("q8_0", 512)


@pytest.mark.parametrize(
    ("named", "types"),
    [
        ({"type_k": F16}, "f16"),
        ({"type_v": F16}, "f16"),
        ({"type_k": Q8_0}, "q8_0/f16"),
        ({"type_k": Q8_0, "type_v": Q8_0, "flash_attn": True}, "q8_0"),
        ({"kv_type": "q8_0/f16", "type_k": Q8_0}, "q8_0/f16"),
        ({"kv_type": "f32"}, "f32"),
    ],
)
def test_types_that_somebody_names_are_taken(
    bundled_model: str, load: Loader, no_warning: None, named: dict[str, Any], types: str
) -> None:
    assert load(bundled_model, kv_budget="2MiB", **named).kv_stats.kv_type == types


def test_flash_attention_is_turned_on_for_quantised_values_alone(
    bundled_model: str, load: Loader
) -> None:
    def on(**options: Any) -> bool:
        params = load(bundled_model, **options).context_params
        return bool(params.flash_attn_type == llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED)

    assert on(kv_type="q4_0", kv_budget=300)
    assert on(kv_budget="1MiB")
    assert not on(kv_type="q4_0/f16", kv_budget=300)
    assert not on(kv_type="f16", kv_budget="1MiB")
    assert not on(kv_budget=300)
    assert on(kv_type="f16", kv_budget="1MiB", flash_attn=True)


def test_llama_cpps_own_cache_has_the_types_too(bundled_model: str, load: Loader) -> None:
    llm = load(bundled_model, n_ctx=512, kv_type="q8_0/q4_0")
    unit = unit_of("q8_0", "q4_0")
    assert abs(llm.kv_stats.kv_bytes - 2 * unit) <= 0.005 * 2**20 + 1
    assert "(0.5 MiB q8_0/q4_0), cache not bounded" in str(llm.kv_stats)
    with pytest.raises(OptionError, match="flash_attn=False turns it off"):
        load(bundled_model, n_ctx=512, kv_type="q8_0", flash_attn=False)
    assert load(bundled_model, kv_type="q8_0", vocab_only=True)


@pytest.mark.parametrize(
    "wrong", ["", "/", "q8_0/", "/q8_0", "Q8_0", "auto/q8_0", "f16/f16/f16", 8, None]
)
def test_what_is_no_type_is_refused(bundled_model: str, wrong: Any) -> None:
    with pytest.raises(OptionError, match=f"kv_type must be auto, a type .*, not '{wrong}'"):
        Llama(bundled_model, kv_type=wrong)


@pytest.mark.parametrize("budget", [{}, {"kv_budget": 300}, {"kv_budget": "1MiB"}])
def test_types_that_contradict_each_other_are_refused(
    bundled_model: str, budget: dict[str, Any]
) -> None:
    with pytest.raises(
        OptionError,
        match="kv_type='q8_0' makes type_v q8_0, but type_v asks for f16: leave one of them out",
    ):
        Llama(bundled_model, kv_type="q8_0", type_v=F16, **budget)


def refused_and_chosen(
    load: Loader, path: str | Path, because: str, options: dict[str, Any]
) -> Llama:
    """What is refused if asked for, and f16 with a warning if chosen."""
    with pytest.raises(OptionError, match=because):
        load(path, kv_type="q8_0", **options)
    with pytest.warns(UserWarning, match=f"the cache is f16 and not q8_0, because .*{because}"):
        return load(path, **options)


def test_where_flash_attention_is_off_memory_is_filled_with_f16(
    bundled_model: str, load: Loader
) -> None:
    llm = refused_and_chosen(
        load, bundled_model, "flash_attn=False", {"kv_budget": "1MiB", "flash_attn": False}
    )
    assert llm.kv_stats.kv_type == "f16"


def test_where_heads_are_no_whole_blocks_memory_is_filled_with_f16(
    random_model: Callable[..., Any], load: Loader
) -> None:
    path = random_model(ModelShape("llama", head_dim=48)).path
    options = {"kv_budget": "1MiB", "n_ctx": 9000}
    llm = refused_and_chosen(load, path, "48 numbers, which are no whole blocks of q8_0", options)
    assert llm.kv_stats.kv_type == "f16"


def test_where_whole_tokens_change_positions_memory_is_filled_with_f16(
    bundled_model: str, load: Loader
) -> None:
    compact = {"kv_budget": "1MiB", "positions": "compact", "n_ctx": 9000}
    refused_and_chosen(
        load, bundled_model, "keys that are not quantised", {**compact, "granularity": "token"}
    )
    assert load(bundled_model, **compact, granularity="head").kv_stats.kv_type == "q8_0"
    with pytest.warns(UserWarning, match="may become token granularity"):
        llm = load(bundled_model, **compact, granularity="auto")
    assert llm.kv_stats.kv_type == "f16"


def test_a_choice_never_makes_cells_too_many(bundled_model: str, load: Loader) -> None:
    """positions='compact' allows no more cells than the trained length, 4096: f16 has 3584 here,
    and q8_0 6912."""
    options = {"positions": "compact", "n_ctx": 90_000, "granularity": "head"}
    with pytest.warns(UserWarning, match="not q8_0, because then .* at most 4096 cells"):
        llm = load(bundled_model, kv_budget="9MiB", **options)
    assert (llm.kv_stats.kv_type, llm.n_cells) == ("f16", 3584)
    with pytest.raises(BudgetError, match="not 6912"):
        load(bundled_model, kv_budget="9MiB", kv_type="q8_0", **options)


def test_where_a_device_packs_words_heads_of_other_sizes_are_not_chosen(
    monkeypatch: pytest.MonkeyPatch, random_model: Callable[..., Any], load: Loader
) -> None:
    """34 bytes are no whole words."""
    path = random_model(ModelShape("llama", head_dim=32)).path
    monkeypatch.setattr(llama_cpp, "llama_supports_gpu_offload", lambda: True)
    options = {"kv_budget": "1MiB", "n_ctx": 9000, "granularity": "head"}
    assert load(path, **options).kv_stats.kv_type == "q8_0"
    with pytest.warns(UserWarning, match="no whole words of 4 bytes"):
        assert load(path, **options, n_gpu_layers=1).kv_stats.kv_type == "f16"
    state = load(path, **options, n_gpu_layers=1, pack="state")
    assert state.kv_stats.kv_type == "q8_0"


def test_where_a_device_may_lack_flash_attention_for_types_that_differ_they_are_not_chosen(
    monkeypatch: pytest.MonkeyPatch, table: None, bundled_model: str, load: Loader
) -> None:
    monkeypatch.setattr(llama_cpp, "llama_supports_gpu_offload", lambda: True)
    options = {"kv_budget": "1MiB", "n_ctx": 2600, "n_gpu_layers": 1}  # a share of 0.16
    with pytest.warns(UserWarning, match="not q8_0/q4_0, because not every device has flash"):
        assert load(bundled_model, **options).kv_stats.kv_type == "f16"
    assert load(bundled_model, **options, kv_type="q8_0/q4_0").kv_stats.kv_type == "q8_0/q4_0"
    options["n_ctx"] = 1000  # 0.41
    assert load(bundled_model, **options).kv_stats.kv_type == "q8_0"


def test_the_models_own_policy_overrules_the_table(
    model: Path,  # noqa: F811
    load: Loader,
) -> None:
    options = {"kv_budget": "1MiB", "n_ctx": 9000}
    path = write(model.parent / "kvp-own.gguf", info_of(model, kv_type="q5_0/q4_1"))
    assert load(str(model), **options).kv_stats.kv_type == "q5_0/q4_1"
    assert load(str(model), **options, policy=str(path)).kv_stats.kv_type == "q5_0/q4_1"
    # not where somebody decides, or tokens are counted, or another policy is used
    assert load(str(model), **options, kv_type="q4_0").kv_stats.kv_type == "q4_0"
    assert load(str(model), **options, type_k=F16).kv_stats.kv_type == "f16"
    assert load(str(model), n_ctx=9000, kv_budget=300).kv_stats.kv_type == "f16"
    assert load(str(model), **options, policy="recency").kv_stats.kv_type == "q8_0"
    write(path, info_of(model, kv_type="f16"))
    assert load(str(model), **options).kv_stats.kv_type == "f16"


def test_another_models_policy_does_not(
    model: Path,  # noqa: F811
    load: Loader,
) -> None:
    other = info_of(model, kv_type="q4_0", fingerprint="another", model_identity="another")
    path = write(model.parent / "kvp-other.gguf", other)
    with pytest.warns(UserWarning, match="another model file"):
        llm = load(str(model), kv_budget="1MiB", n_ctx=9000, policy=str(path))
    assert llm.kv_stats.kv_type == "q8_0"


def test_a_copy_has_the_same_types(bundled_model: str, load: Loader) -> None:
    llm = load(bundled_model, kv_budget="1MiB", n_ctx=9000)
    copy = load(llm.model_path, **{k: v for k, v in llm.__getstate__().items() if k in _COPIED})
    assert copy.kv_stats == llm.kv_stats
    assert copy.kv_stats.kv_type == "q8_0"


_COPIED = ("kv_budget", "kv_type", "n_ctx", "type_k", "type_v", "flash_attn")


def test_what_it_says_names_types_that_are_not_f16(bundled_model: str, load: Loader) -> None:
    assert "in 768 cells (1.0 MiB q8_0)" in str(load(bundled_model, kv_budget="1MiB").kv_stats)
    assert "in 768 cells (1.9 MiB)" in str(load(bundled_model, kv_budget=500).kv_stats)
