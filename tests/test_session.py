"""Saved sessions: what comes back goes on token for token, and what does not fit is refused."""

from __future__ import annotations

import contextlib
import json
import os
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import RandomModel, random_tokens
from kvp_edge import KVCacheError, Llama, SessionError, sessions
from kvp_edge.cache import manager
from kvp_edge.cache import session_file as session
from kvp_edge.llamacpp import base
from kvp_edge.policies import Random
from makers import record_files
from makers.gguf_models import ModelShape
from support.interrupt import interrupted

Maker = Callable[[ModelShape], RandomModel]
Loader = Callable[..., Llama]

LLAMA = ModelShape("llama")
WINDOW = ModelShape("gemma3", head_dim=64, n_head_kv=2, n_layer=4, sliding_window=24)
BOUND = {"n_ctx": 3000, "kv_budget": 100, "recent": 20, "reserve": 60, "granularity": "head"}


def go_on(llm: Llama, n: int = 40) -> list[int]:
    """Greedy continuation of what was read, over at least one more eviction."""
    before = llm.kv_stats.evictions
    llm.eval(random_tokens(90, seed=5))
    out = []
    tokens = llm.generate([*llm.input_ids[: llm.n_tokens].tolist(), 42], temp=0.0, reset=True)
    for token in tokens:
        out.append(token)
        if len(out) == n:
            break
    assert llm.kv_stats.evictions > before
    return out


@pytest.mark.parametrize("granularity", ["head", "token"])
@pytest.mark.parametrize("policy", ["keydiff", "knorm", "random"])
@pytest.mark.parametrize("shape", [LLAMA, ModelShape("qwen3", head_dim=64), WINDOW])
@pytest.mark.parametrize("flash_attn", [False, True])
def test_a_resumed_chat_goes_on_token_for_token(
    random_model: Maker,
    load: Loader,
    tmp_path: Path,
    granularity: str,
    policy: str,
    shape: ModelShape,
    flash_attn: bool,
) -> None:
    kind = {**BOUND, "granularity": granularity, "policy": policy, "flash_attn": flash_attn}
    first = load(random_model(shape).path, **kind)
    first.eval(random_tokens(400))
    first.save_session(tmp_path / "s", extra={"messages": ["hi"]})
    second = load(random_model(shape).path, **kind)
    assert second.load_session(tmp_path / "s") == {"messages": ["hi"]}
    for name in ("seen", "kept", "dropped"):
        assert second.kv_stats[name] == first.kv_stats[name]
    np.testing.assert_array_equal(second.kv_indices, first.kv_indices)
    assert go_on(second) == go_on(first)


def test_a_chat_resumed_with_messages_does_not_read_them_again(
    random_model: Maker, load: Loader, tmp_path: Path
) -> None:
    def chat(llm: Llama, messages: list[dict[str, str]], text: str) -> str:
        messages.append({"role": "user", "content": text})
        answer: Any = llm.create_chat_completion(messages, max_tokens=60, temperature=0.0)
        messages.append(answer["choices"][0]["message"])
        return str(messages[-1]["content"])

    first = load(random_model(LLAMA).path, **BOUND)
    messages: list[dict[str, str]] = []
    for text in ("the thing and another", "then the other thing", "and the end " * 9):
        chat(first, messages, text)
    assert first.kv_stats.evictions > 0
    first.save_session(tmp_path / "s", extra=messages)
    second = load(random_model(LLAMA).path, **BOUND)
    resumed = second.load_session(tmp_path / "s")
    n_seen = second.kv_stats.seen
    assert chat(second, resumed, "so?") == chat(first, messages, "so?")
    assert second.kv_stats.seen > n_seen
    assert second.kv_stats.evictions <= 1  # the beginning was not read again


def test_saving_changes_nothing(random_model: Maker, load: Loader, tmp_path: Path) -> None:
    one, other = (load(random_model(LLAMA).path, **BOUND) for _ in range(2))
    for llm in (one, other):
        llm.eval(random_tokens(400))
    one.save_session(tmp_path / "s")
    assert go_on(one) == go_on(other)


def test_a_session_may_go_on_in_a_longer_context_but_not_in_too_short_a_one(
    random_model: Maker, load: Loader, tmp_path: Path
) -> None:
    llm = load(random_model(LLAMA).path, **BOUND)
    llm.eval(random_tokens(400))
    llm.save_session(tmp_path / "s")
    longer = load(random_model(LLAMA).path, **{**BOUND, "n_ctx": 9000})
    longer.load_session(tmp_path / "s")
    assert longer.kv_stats.seen == 400
    shorter = load(random_model(LLAMA).path, **{**BOUND, "n_ctx": 399})
    with pytest.raises(SessionError, match="400 tokens, too many .* n_ctx=399"):
        shorter.load_session(tmp_path / "s")


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"granularity": "token"}, "granularity"),
        ({"policy": "knorm"}, "policy"),
        ({"policy": Random(seed=3)}, "policy"),
        ({"kv_budget": 101}, "budget"),
        ({"recent": 19}, "recent"),
        ({"sinks": 5}, "sinks"),
        ({"reserve": 200}, "cells"),
        ({"n_batch": 30}, "n_batch"),
        ({"type_k": 0}, "type_k"),
        ({"type_v": 0}, "type_v"),
        ({"flash_attn": True}, "v_transposed"),
        ({"rope_freq_base": 5000.0}, "rope"),
        ({"positions": "compact"}, "positions"),
    ],
)
def test_other_settings_are_refused_by_name_and_the_chat_at_hand_is_untouched(
    random_model: Maker, load: Loader, tmp_path: Path, change: dict[str, Any], name: str
) -> None:
    bound = {**BOUND, "policy": "random"}
    llm = load(random_model(LLAMA).path, **bound)
    llm.eval(random_tokens(300))
    llm.save_session(tmp_path / "s")
    other = load(random_model(LLAMA).path, **{**bound, **change})
    other.eval(random_tokens(200))
    with pytest.raises(SessionError, match=f"with {name} = .* but here it is"):
        other.load_session(tmp_path / "s")
    assert other.kv_stats.seen == 200
    other.eval([7])


def test_a_session_of_other_types_names_those_it_was_saved_with(
    bundled_model: str, load: Loader, tmp_path: Path
) -> None:
    """By itself kv_type may have chosen otherwise then."""
    llm = load(bundled_model, kv_budget="2MiB", kv_type="q8_0/q5_0")
    llm.eval(random_tokens(50))
    llm.save_session(tmp_path / "s")
    other = load(bundled_model, kv_budget="2MiB", kv_type="q8_0")
    with pytest.raises(
        SessionError,
        match="with type_v = q5_0, but here it is q8_0: load the model with kv_type='q8_0/q5_0'",
    ):
        other.load_session(tmp_path / "s")
    again = load(bundled_model, kv_budget="2MiB", kv_type="q8_0/q5_0")
    again.load_session(tmp_path / "s")
    assert again.kv_stats.seen == 50


def test_another_model_is_refused(random_model: Maker, load: Loader, tmp_path: Path) -> None:
    llm = load(random_model(LLAMA).path, **BOUND)
    llm.eval(random_tokens(50))
    llm.save_session(tmp_path / "s")
    other = load(random_model(ModelShape("llama", seed=1)).path, **BOUND)
    with pytest.raises(SessionError, match="another model file .model = "):
        other.load_session(tmp_path / "s")


@pytest.fixture
def saved(random_model: Maker, load: Loader, tmp_path: Path) -> tuple[Llama, Path]:
    llm = load(random_model(LLAMA).path, **BOUND)
    llm.eval(random_tokens(300))
    llm.save_session(tmp_path / "s")
    return llm, tmp_path / "s"


@pytest.mark.parametrize("where", [0, 9, 20, 300, -40, -1])
def test_a_changed_byte_anywhere_is_noticed(saved: tuple[Llama, Path], where: int) -> None:
    llm, path = saved
    data = bytearray(path.read_bytes())
    data[where] ^= 1
    path.write_bytes(data)
    with pytest.raises(SessionError, match="not a session|of version|damaged or cut short"):
        llm.load_session(path)


@pytest.mark.parametrize("size", [0, 7, 30, 1000, -1])
def test_a_file_cut_short_is_noticed(saved: tuple[Llama, Path], size: int) -> None:
    llm, path = saved
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(SessionError, match="not a session|damaged or cut short"):
        llm.load_session(path)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("seen", lambda h, a: h["table"].update(seen=299)),
        ("tail", lambda h, a: h["table"].update(tail=300)),
        ("rows", lambda h, a: a.update(packed_indices=a["packed_indices"][:, :, ::-1])),
        ("cells", lambda h, a: a.update(packed_llama_positions=a["packed_llama_positions"] + 1)),
        ("scores", lambda h, a: a.update(scores=np.zeros((2, 2, 999), np.float32))),
        ("state", lambda h, a: a.update(state=a["state"][:-4])),
        (
            "type",
            lambda h, a: a.update(
                packed_llama_positions=a["packed_llama_positions"].astype(np.float32)
            ),
        ),
    ],
)
def test_a_table_that_does_not_add_up_is_refused_and_the_chat_at_hand_is_untouched(
    saved: tuple[Llama, Path], name: str, change: Any
) -> None:
    llm, path = saved
    header, arrays = session.read(path)
    change(header, arrays)
    session.write(path, header, arrays)
    with pytest.raises(SessionError, match="is inconsistent|does not fit"):
        llm.load_session(path)
    assert llm.kv_stats.seen == 300
    llm.eval([7])


def test_a_header_that_does_not_add_up_is_refused(tmp_path: Path) -> None:
    for text in (
        b"{}",
        b"[]",
        b"\xff",
        json.dumps({"arrays": [{"name": "a", "dtype": "object", "shape": [1]}]}).encode(),
        json.dumps({"arrays": [{"name": "a", "dtype": "int32", "shape": [2**62]}]}).encode(),
        json.dumps({"arrays": [{"name": "a", "dtype": "int32", "shape": [-1]}]}).encode(),
    ):
        for lengths in ({}, {"header_bytes": 2**31}, {"length": 2**40}, {"length": 2**64 - 64}):
            (tmp_path / "s").write_bytes(_raw(text, **lengths))
            with pytest.raises(SessionError, match="damaged or cut short: (?!its checksum)"):
                session.read(tmp_path / "s")


def _raw(header: bytes, **lengths: int) -> bytes:
    """A session of one conversation with this header, without arrays."""
    start = record_files.start(session.MAGIC, session.VERSION)
    return record_files.followed(start, record_files.record(b"conv", header, **lengths))


Change = Callable[[dict[str, Any], dict[str, Any]], object]


#: What is wrong, and how it becomes so.
HOSTILE: list[tuple[str, Change]] = [
    *(
        (f"{n}={v!r:.20}", lambda h, a, n=n, v=v: h.update({n: v}))
        for n, v in [
            ("made_with", []),
            ("made_with", None),
            ("table", []),
            ("table", {}),
            ("protected_prefix", "4"),
            ("protected_prefix", 2.5),
            ("protected_prefix", True),
            ("protected_prefix", -1),
            ("protected_prefix", 80),
            ("protected_prefix", 2**70),
            ("evictions", None),
            ("evictions", -1),
            ("evictions", 10**400),
            ("eviction_ms", "1"),
            ("eviction_ms", 10**400),
            ("eviction_ms", -0.5),
            ("recalls", -1),
            ("recalled", None),
            ("recalled", 10**400),
            ("recall_ms", "1"),
            ("log", 1),
            ("log", []),
        ]
    ),
    *(
        (f"no {n}", lambda h, a, n=n: h.pop(n))
        for n in (
            *("made_with", "table", "protected_prefix", "log", "evictions", "eviction_ms"),
            "extra",
        )
    ),
    *(
        (f"table {n}={v!r}", lambda h, a, n=n, v=v: h["table"].update({n: v}))
        for n, v in [
            ("seen", "300"),
            ("seen", 300.0),
            ("seen", 2**40),
            ("tail", None),
            ("shift", True),
            ("shift", 2**31),
            ("marked", -1),
            ("marked", 10**30),
            ("class", 1),
        ]
    ),
    *(
        (f"no array {n}", lambda h, a, n=n: a.pop(n))
        for n in (
            "tokens",
            "packed_indices",
            "packed_rope_positions",
            "packed_llama_positions",
            "scores",
            "spans",
            "state",
        )
    ),
    *(
        (f"{n} of more axes", lambda h, a, n=n: a.update({n: a[n][..., None]}))
        for n in ("tokens", "packed_indices", "packed_llama_positions", "scores", "spans", "state")
    ),
    ("one array more", lambda h, a: a.update(more=np.zeros(1, np.int32))),
    ("tokens f32", lambda h, a: a.update(tokens=a["tokens"].view(np.float32))),
    ("scores i32", lambda h, a: a.update(scores=a["scores"].view(np.int32))),
    *(
        (f"token {v}", lambda h, a, v=v: _set(a, "tokens", 250, v))
        for v in (2**31 - 1, -1, -(2**31), 320)
    ),
    ("rotated too far", lambda h, a: _set(a, "packed_rope_positions", 9, 2**31 - 1)),
    ("rotated below 0", lambda h, a: _set(a, "packed_rope_positions", 9, -1)),
    # each of these is larger than the one before by an int32 difference that overflows
    (
        "cells wrap",
        lambda h, a: a["packed_llama_positions"].__setitem__(slice(1, 3), (2**31 - 1, -2)),
    ),
    ("an empty span", lambda h, a: a.update(spans=_spans((5, 5, 1)))),
    ("overlapping", lambda h, a: a.update(spans=_spans((5, 9, 1), (8, 12, 1)))),
    ("a span of no kind", lambda h, a: a.update(spans=_spans((5, 9, 3)))),
    ("a span before 0", lambda h, a: a.update(spans=_spans((-2, 9, 1)))),
]


def _accepted(llm: Llama, path: Path, hostile: list[tuple[str, Change]]) -> list[str]:
    """Those that are not refused with a sentence, or change anything all the same."""
    kv = llm.kv
    assert kv is not None
    state = (kv.snapshot(), kv.protected_prefix, kv.evictions, kv.eviction_ms, llm.n_tokens)
    good, accepted = path.read_bytes(), []
    for name, change in hostile:
        header, arrays = session.read(path)
        change(header, arrays)
        session.write(path, header, arrays)
        try:
            llm.load_session(path)
            accepted.append(name)
        except SessionError as error:
            said = re.search("is inconsistent|does not fit|was saved with", str(error))
            now = (kv.snapshot(), kv.protected_prefix, kv.evictions, kv.eviction_ms, llm.n_tokens)
            if not said or now[0] is not state[0] or now[1:] != state[1:]:
                accepted.append(f"{name}: {error}")
        path.write_bytes(good)
    return accepted


def test_whatever_is_wrong_with_a_header_or_array_is_refused_and_the_chat_goes_on(
    random_model: Maker, load: Loader, saved: tuple[Llama, Path]
) -> None:
    llm, path = saved
    llm.reset()
    llm.eval(random_tokens(200, seed=3))
    assert _accepted(llm, path, HOSTILE) == []
    never_asked = load(random_model(LLAMA).path, **BOUND)
    never_asked.eval(random_tokens(200, seed=3))
    assert go_on(llm) == go_on(never_asked)


def _set(arrays: dict[str, Any], name: str, at: int, value: int) -> None:
    arrays[name] = arrays[name].copy()
    arrays[name].reshape(-1)[at] = value


def _spans(*spans: tuple[int, int, int]) -> Any:
    return np.array(spans, np.int32)


def test_the_numbers_at_the_limit_are_accepted(saved: tuple[Llama, Path]) -> None:
    llm, path = saved
    header, arrays = session.read(path)
    header |= {"protected_prefix": 79, "evictions": 2**31 - 1, "eviction_ms": 0}
    arrays["tokens"] = arrays["tokens"].copy()
    arrays["tokens"][-2:] = 0, 319  # of a vocabulary of 320
    session.write(path, header, arrays)
    llm.load_session(path)
    llm.eval(random_tokens(90, seed=5))
    assert llm.kv_stats.evictions == 2**31


HOSTILE_RESCUED: list[tuple[str, Change]] = [
    *(
        (f"{n}={v!r:.20}", lambda h, a, n=n, v=v: h.update({n: v}))
        for n, v in [
            ("rescue", 1),
            ("model", None),
            ("protected_prefix", "x"),
            ("protected_prefix", None),
            ("protected_prefix", -1),
            ("protected_prefix", 80),
        ]
    ),
    *((f"no {n}", lambda h, a, n=n: h.pop(n)) for n in ("model", "protected_prefix", "extra")),
    ("no tokens", lambda h, a: a.clear()),
    ("a token below 0", lambda h, a: _set(a, "tokens", 50, -1)),
    ("a token too large", lambda h, a: _set(a, "tokens", 50, 320)),
]


def test_whatever_is_wrong_with_a_rescued_conversation_is_refused(
    random_model: Maker, load: Loader, tmp_path: Path
) -> None:
    llm = load(random_model(LLAMA).path, **BOUND, protect_system=True)
    llm.eval(random_tokens(100))
    _rescue(llm, tmp_path / "r")
    llm.eval(random_tokens(100))
    assert _accepted(llm, tmp_path / "r", HOSTILE_RESCUED) == []
    assert llm.kv_stats.seen == 200


def _rescue(llm: Llama, path: Path, extra: Callable[[], Any] | None = None) -> None:
    """As if a device failed."""
    llm.rescue_to(path, extra)
    llm.rescue("a device failed")
    llm.rescue_to(None)


def test_a_conversation_is_not_rescued_through_a_link_that_somebody_put_there(
    random_model: Maker, load: Loader, tmp_path: Path
) -> None:
    """The name lies in a folder that anybody may write to."""
    llm = load(random_model(LLAMA).path, **BOUND)
    llm.eval(random_tokens(100))
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "r").symlink_to(tmp_path / "mine")
    with pytest.raises(SessionError, match="it is a link"):
        _rescue(llm, tmp_path / "r")
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_conversation_is_rescued_without_what_cannot_be_written(
    random_model: Maker, load: Loader, tmp_path: Path
) -> None:
    llm = load(random_model(LLAMA).path, **BOUND)
    llm.eval(random_tokens(100))
    with pytest.raises(TypeError, match="JSON"):
        _rescue(llm, tmp_path / "r", object)
    assert llm.load_session(tmp_path / "r") is None
    assert llm.kv_stats.seen == 100


def test_what_is_no_file_is_refused_at_once(saved: tuple[Llama, Path]) -> None:
    llm, path = saved
    os.mkfifo(path.parent / "fifo")
    for name in (path.parent / "fifo", path.parent, "/dev/zero"):
        with pytest.raises(SessionError, match="cannot be read: it is not a regular file"):
            llm.load_session(name)
    with pytest.raises(SessionError, match="cannot be written to .* it is not a regular file"):
        llm.save_session(path.parent / "fifo")
    assert llm.kv_stats.seen == 300


def test_a_length_is_compared_with_the_file_before_anything_is_made_of_it(
    saved: tuple[Llama, Path],
) -> None:
    """Files with holes say that they have 2^40 bytes, without taking any."""
    llm, path = saved
    header, _ = session.read(path)
    start = record_files.start(session.MAGIC, session.VERSION)
    head = struct.pack("<4sIQ", b"conv", 2**31, 2**40 - 64)
    for data in (b"", b"x" * 100, start[:8], start, start + head):
        path.write_bytes(data)
        os.truncate(path, 2**40)
        with pytest.raises(
            SessionError, match="not a session|damaged or cut short: (?!its checksum)|of version"
        ):
            llm.load_session(path)
    with open(path, "r+b") as file:  # with the other end of that record, too
        file.seek(2**40 - 16)
        file.write(struct.pack("<Q4sI", 2**40 - 64, b"conv", 0))
    with pytest.raises(SessionError, match="its header would have 2147483648 bytes"):
        llm.load_session(path)
    # one that adds up, but that no cache here has room for
    described = [{"name": "state", "dtype": "uint8", "shape": [2**40]}]
    text = json.dumps({**header, "blocks": [], "arrays": described}).encode()
    length = 16 + len(text) + -(16 + len(text)) % 64 + 2**40 + 16
    path.write_bytes(start + struct.pack("<4sIQ", b"conv", len(text), length) + text)
    with open(path, "r+b") as file:
        file.seek(64 + length - 16)
        file.write(struct.pack("<Q4sI", length, b"conv", 0))
    with pytest.raises(
        SessionError, match="^the session '[^']*' does not fit: it has 1099511627776 bytes"
    ):
        llm.load_session(path)
    assert llm.kv_stats.seen == 300


def test_a_header_nested_too_deeply_is_refused(saved: tuple[Llama, Path]) -> None:
    llm, path = saved
    for text in (b"[" * 100_000, b'{"a":' * 100_000, b'{"arrays": [], "a": ' + b"9" * 5000 + b"}"):
        path.write_bytes(_raw(text))
        with pytest.raises(SessionError, match="damaged or cut short: (?!its checksum)"):
            llm.load_session(path)
    nested: Any = []
    for _ in range(100_000):
        nested = [nested]
    with pytest.raises(SessionError, match="as JSON"):
        llm.save_session(path, extra=nested)


def test_a_state_that_llama_cpp_itself_refuses_leaves_the_conversation_as_it_was(
    random_model: Maker,
    load: Loader,
    saved: tuple[Llama, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It has emptied the cache by then."""
    llm, path = saved
    llm.reset()
    llm.eval(random_tokens(200, seed=3))
    assert llm.kv is not None
    real, refused = llm.kv.cache.restore, []

    def fails_once(*args: Any) -> None:
        if refused:
            real(*args)
            return
        refused.append(1)
        llm._ctx.kv_cache_seq_rm(0, -1, -1)
        raise KVCacheError("llama.cpp took 0 of the bytes")

    monkeypatch.setattr(llm.kv.cache, "restore", fails_once)
    with pytest.raises(SessionError, match="does not fit: llama.cpp rejects its state"):
        llm.load_session(path)
    assert llm.kv_stats.seen == llm.n_tokens == 200
    never_asked = load(random_model(LLAMA).path, **BOUND)
    never_asked.eval(random_tokens(200, seed=3))
    assert go_on(llm) == go_on(never_asked)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # in a finalizer
def test_an_interrupt_at_any_moment_of_a_load_leaves_one_conversation_or_none(
    random_model: Maker, load: Loader, tmp_path: Path
) -> None:
    """Whatever its text is then goes on as if it had just been read."""
    llm, fresh = (load(random_model(LLAMA).path, **BOUND) for _ in range(2))
    texts = {n: random_tokens(n, seed=n) for n in (90, 60)}
    want = {}
    for n, text in {0: [], **texts}.items():
        fresh.reset()
        want[n] = fresh.create_completion([*text, 7, 8], max_tokens=5, temperature=0.0)["choices"]
    llm.eval(texts[90])
    llm.save_session(tmp_path / "s")
    here = [module.__file__ for module in (sessions, manager, base, contextlib)]
    found = set()

    def survives(at: int) -> bool:
        llm.reset()
        llm.eval(texts[60])
        came = interrupted(lambda: llm.load_session(tmp_path / "s"), at, *map(str, here))
        n = llm.n_tokens
        assert llm.input_ids[:n].tolist() == texts.get(n, [])
        prompt = [*texts.get(n, []), 7, 8]
        reply = llm.create_completion(prompt, max_tokens=5, temperature=0.0)
        assert reply["choices"] == want[n], at
        found.add(n)
        return came

    assert next(at for at in range(1000) if not survives(at)) > 30
    assert found >= {60, 90}


def test_a_session_that_is_refused_after_an_interrupt_makes_nobody_trust_the_cache(
    saved: tuple[Llama, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An eviction in place leaves llama.cpp's newest position as it was."""
    llm, path = saved
    assert llm.kv is not None
    pack = llm.kv.cache.pack

    def interrupt(*args: Any) -> None:
        pack(*args)
        raise KeyboardInterrupt

    def refuses(*_: Any) -> None:
        raise ValueError("a state that does not fit")

    llm.eval(random_tokens(10))
    with monkeypatch.context() as patch:
        patch.setattr(llm.kv.cache, "pack", interrupt)
        with pytest.raises(KeyboardInterrupt):
            llm.evict()
        patch.setattr(llm.kv.cache, "restore", refuses)
        with pytest.raises(SessionError, match="does not fit"):
            llm.load_session(path)
    with pytest.raises(KVCacheError, match="interrupted"):
        llm.eval([7])


def test_a_session_is_saved_through_a_link_and_for_nobody_else_to_read(
    saved: tuple[Llama, Path],
) -> None:
    llm, path = saved
    link = path.parent / "link"
    link.symlink_to(path)
    path.write_bytes(b"old")
    llm.save_session(link)
    assert link.is_symlink()
    assert path.stat().st_mode & 0o777 == 0o600
    llm.load_session(path)


def test_an_interrupted_save_leaves_the_old_file(
    saved: tuple[Llama, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm, path = saved
    before = path.read_bytes()

    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.save_session(path)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_what_cannot_be_written_or_read_says_so(saved: tuple[Llama, Path]) -> None:
    llm, path = saved
    with pytest.raises(SessionError, match="cannot be written to") as told:
        llm.save_session(path / "below" / "a" / "file")
    assert "Errno" not in str(told.value)
    assert ".part" not in str(told.value)
    with pytest.raises(SessionError, match="cannot be read: No such file") as told:
        llm.load_session(path.parent / "absent")
    assert "Errno" not in str(told.value)
    with pytest.raises(SessionError, match="as JSON"):
        llm.save_session(path, extra=object())
    llm.reset()
    with pytest.raises(SessionError, match="nothing to save"):
        llm.save_session(path)


def test_an_unbounded_model_has_no_session(random_model: Maker, load: Loader) -> None:
    llm = load(random_model(LLAMA).path)
    with pytest.raises(SessionError, match="kv_budget"):
        llm.save_session("never")


def test_a_state_that_llama_cpp_does_not_take_leaves_nothing_and_says_so(
    saved: tuple[Llama, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm, path = saved
    assert llm.kv is not None
    cache = llm.kv.cache

    def fails(*args: Any) -> None:
        llm._ctx.kv_cache_seq_rm(0, -1, -1)
        raise KVCacheError("llama.cpp took 0 of the bytes")

    monkeypatch.setattr(cache, "restore", fails)
    with pytest.raises(KVCacheError):
        llm.load_session(path)
    assert llm.kv_stats.seen == 0
    assert llm.n_tokens == 0
    monkeypatch.undo()
    llm.load_session(path)
    assert llm.kv_stats.seen == 300


def test_the_identity_of_a_file_tells_files_apart(tmp_path: Path) -> None:
    path = tmp_path / "f"
    data = bytearray(np.random.default_rng(0).integers(0, 256, 3 * 2**20, np.uint8).tobytes())
    path.write_bytes(data)
    first = session.file_identity(path)
    assert session.file_identity(path) == first
    data[100] ^= 1
    path.write_bytes(data)
    assert session.file_identity(path) != first
    data[100] ^= 1
    path.write_bytes(data[:-1])
    assert session.file_identity(path) != first


def test_arrays_of_any_byte_order_are_written_little_endian(tmp_path: Path) -> None:
    for order in "<>":
        numbers = np.array([1, -2, 2**30], np.dtype(np.int32).newbyteorder(order))
        session.write(tmp_path / "a.kvp", {}, {"numbers": numbers})
        assert struct.pack("<3i", 1, -2, 2**30) in (tmp_path / "a.kvp").read_bytes()
        read = session.read(tmp_path / "a.kvp")[1]["numbers"]
        assert read.dtype == np.int32
        np.testing.assert_array_equal(read, numbers)
