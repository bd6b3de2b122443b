"""The bounded Llama on real GGUF files: what llama_cpp.Llama does, past a full cache."""

from __future__ import annotations

import itertools
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import kvp_edge
from conftest import RandomModel, beside, random_tokens
from kvp_edge import BudgetError, ContextLengthError, KVCacheError, UnsupportedModelError
from kvp_edge.policies import POLICIES, ArrayView, CacheView, KeyDiff, KNorm, Policy
from kvp_edge.text.pieces import token_text
from makers.gguf_models import ModelShape, write_bert, write_mamba
from support.properties import examples

Loader = Callable[..., kvp_edge.Llama]
Maker = Callable[[ModelShape], RandomModel]

SHAPES = {
    "llama": ModelShape("llama", head_dim=32),
    "qwen2": ModelShape("qwen2", n_embd=256, head_dim=64),
    "qwen3": ModelShape("qwen3", head_dim=128, n_head=2, n_head_kv=1),
}
LLAMA = SHAPES["llama"]

#: Largest logit error over the logits' standard deviation. f16 keys and values round to 2^-11;
#: measured 0.009 at most (tests/test_reference.py), while these evictions move logits by 2 to 5.
F16_LOGITS = 0.02


@pytest.fixture
def plain() -> Any:
    """plain(path, **kwargs) -> llama_cpp.Llama, the reference for behaviour."""
    made: list[llama_cpp.Llama] = []

    def make(path: str, **kwargs: Any) -> llama_cpp.Llama:
        kwargs = {"verbose": False, "n_threads": 1, "n_threads_batch": 1, **kwargs}
        made.append(llama_cpp.Llama(path, **kwargs))
        return made[-1]

    yield make
    for llm in made:
        llm.close()


def check_stats(llm: kvp_edge.Llama) -> None:
    stats = llm.kv_stats
    assert stats.kept + stats.dropped == stats.seen
    assert stats.kept <= stats.cells
    assert stats.seen == llm.n_tokens


# -- as before ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_with_a_budget_never_reached_greedy_output_is_llama_cpps(
    shape: str, random_model: Maker, load: Loader, plain: Any
) -> None:
    path = random_model(SHAPES[shape]).path
    bounded, reference = load(path, n_ctx=512, kv_budget=512, recall="auto"), plain(path, n_ctx=512)
    for llm in (bounded, reference):
        llm.out = llm.create_completion(random_tokens(90), max_tokens=60, temperature=0.0)
    assert bounded.out["choices"] == reference.out["choices"]
    assert bounded.out["usage"] == reference.out["usage"]


def test_also_across_the_turns_of_a_chat(bundled_model: str, load: Loader, plain: Any) -> None:
    turns = ["My dog is called Rex. ", "I like tea.", "What is my dog called?"]
    said: dict[str, list[str]] = {}
    for name, llm in {
        "bounded": load(bundled_model, n_ctx=2048, kv_budget=1024),
        "plain": plain(bundled_model, n_ctx=2048),
    }.items():
        messages: list[Any] = []
        for turn in turns:
            messages.append({"role": "user", "content": turn})
            reply = llm.create_chat_completion(messages, max_tokens=40, temperature=0.0)
            messages.append(reply["choices"][0]["message"])
        said[name] = [m["content"] for m in messages]
    assert said["bounded"] == said["plain"]


def test_seed_stop_stream_and_grammar_behave_as_before(
    bundled_model: str, load: Loader, plain: Any
) -> None:
    prompt = "It was a dark night and"
    grammar = llama_cpp.LlamaGrammar.from_string('root ::= ("a" | "b" | "c")+', verbose=False)
    cases: list[dict[str, Any]] = [
        {"max_tokens": 30, "seed": 5, "temperature": 1.5},
        {"max_tokens": 60, "temperature": 0.0, "stop": ["e "]},
        {"max_tokens": 20, "temperature": 0.0, "grammar": grammar},
        {"max_tokens": 12, "temperature": 0.0, "echo": True, "repeat_penalty": 1.3},
        {"max_tokens": 5, "temperature": 0.0, "logit_bias": {100: 100.0}},
    ]
    bounded, reference = load(bundled_model, n_ctx=512, kv_budget=400), plain(bundled_model)
    for case in cases:
        want = reference.create_completion(prompt, **case)["choices"][0]
        assert bounded.create_completion(prompt, **case)["choices"][0] == want
        streamed = list(bounded.create_completion(prompt, stream=True, **case))
        if not case.get("echo"):
            assert "".join(c["choices"][0]["text"] for c in streamed) == want["text"]
        assert streamed[-1]["choices"][0]["finish_reason"] == want["finish_reason"]
    assert bounded(prompt, max_tokens=3, temperature=0.0)["usage"]["completion_tokens"] == 3


def test_without_a_budget_it_is_llama_cpps_class(bundled_model: str, load: Loader) -> None:
    llm = load(bundled_model, n_ctx=256)
    llm.create_completion("Hello", max_tokens=4)
    stats = llm.kv_stats
    assert (stats.dropped, stats.budget, stats.policy) == (0, None, None)
    assert stats.cells == llm.n_ctx() == 256
    assert stats.seen == stats.kept == llm.n_tokens


# -- eviction is what it says ------------------------------------------------------------------


class Reader:
    """Reads tokens and records, for each batch, which positions it could attend to."""

    def __init__(self, llm: kvp_edge.Llama) -> None:
        self.llm = llm
        self.visible: list[np.ndarray] = []
        llm.on_batch = self.see

    def see(self, start: int, end: int) -> None:
        held = self.llm.kv_indices
        for j in range(start, end):
            self.visible.append(held[held <= j])

    def matrix(self) -> np.ndarray:
        n = len(self.visible)
        matrix = np.zeros((n, n), np.bool_)
        for j, positions in enumerate(self.visible):
            matrix[j, positions] = True
        return matrix


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("policy", ["recency", "knorm", "keydiff"])
def test_logits_equal_a_reference_that_attends_to_exactly_the_kept_tokens(
    shape: str, policy: str, random_model: Maker, load: Loader
) -> None:
    model = random_model(SHAPES[shape])
    llm = load(
        model.path,
        n_ctx=1000,
        kv_budget=100,
        reserve=156,
        recent=20,
        policy=policy,
        logits_all=True,
        n_batch=64,
    )
    reader = Reader(llm)
    tokens = random_tokens(420)
    llm.eval(tokens[:400])
    for token in tokens[400:]:  # decoding, one by one
        llm.eval([token])
    assert llm.kv_stats.evictions >= 2
    visible = reader.matrix()
    assert not visible[-1].all()
    want = model.reference.logits(tokens, visible=visible)
    got = llm.scores[: len(tokens)]
    assert np.abs(got - want).max() / want.std() < F16_LOGITS
    full = model.reference.logits(tokens)
    assert np.abs(got[-1] - full[-1]).max() / want.std() > 10 * F16_LOGITS


@pytest.mark.parametrize("policy", [KNorm(), KeyDiff()], ids=lambda p: p.name)
def test_what_is_kept_is_what_the_reference_scores_say(
    policy: Policy, random_model: Maker, load: Loader
) -> None:
    """One eviction at 256 cells: the 80 tokens of the highest mean z-score besides the protected.

    Computed in f64 from the reference's keys; ties at f16 rounding may fall either way, so the sets
    may differ only in tokens whose scores are within rounding of the border.
    """
    model = random_model(ModelShape("qwen3", head_dim=64))
    llm = load(
        model.path, n_ctx=999, kv_budget=100, reserve=156, sinks=4, recent=16, policy=policy.name
    )
    tokens = random_tokens(257)
    llm.eval(tokens[:156])
    llm.eval(tokens[156:256])
    llm.eval(tokens[256:])
    assert llm.kv_stats.evictions == 1
    candidates = np.arange(4, 240)
    keys = model.reference.keys(tokens[:256])
    scores = policy.score(ArrayView(keys, keys[..., :0], np.arange(256)))
    flat = scores.reshape(-1, 256)[:, candidates].astype(np.float64)
    z = ((flat - flat.mean(1, keepdims=True)) / flat.std(1, keepdims=True)).mean(0)
    border = np.sort(z)[-80]
    kept = set(llm.kv_indices.tolist()) - {256}
    assert kept >= set(range(4)) | set(range(240, 256))
    assert len(kept) == 100
    for position, score in zip(candidates, z, strict=True):
        if abs(score - border) > 0.02:
            assert (position in kept) == (score > border)


def test_recency_keeps_sinks_and_the_newest(random_model: Maker, load: Loader) -> None:
    llm = load(random_model(LLAMA).path, n_ctx=999, kv_budget=100, policy="recency", sinks=4)
    llm.eval(random_tokens(500))
    kept = llm.kv_indices
    n = len(kept)
    assert kept.tolist() == [0, 1, 2, 3, *range(500 - (n - 4), 500)]


def test_random_keeps_the_same_tokens_every_time(random_model: Maker, load: Loader) -> None:
    llm = load(random_model(LLAMA).path, n_ctx=999, kv_budget=100, policy="random")
    llm.eval(random_tokens(700))
    first = llm.kv_indices
    llm.reset()
    llm.eval(random_tokens(700))
    np.testing.assert_array_equal(llm.kv_indices, first)


def test_a_policy_of_ones_own_sees_keys_values_and_positions(
    random_model: Maker, load: Loader
) -> None:
    class OddFirst(Policy):
        name = "odd-first"

        def score(self, view: CacheView) -> Any:
            assert view.shape == (2, 2, len(view.indices))
            assert view.keys().shape == (*view.shape, 32)
            assert view.values().shape == (*view.shape, 32)
            return np.broadcast_to((view.indices % 2).astype(np.float32), view.shape)

    llm = load(
        random_model(LLAMA).path,
        n_ctx=999,
        kv_budget=100,
        reserve=156,
        recent=8,
        policy=OddFirst(),
    )
    llm.eval(random_tokens(256))
    llm.eval([7])
    assert all(p % 2 for p in llm.kv_indices[4:-9].tolist())


class NeighboursSeen(Policy):
    """A score is final when a token was seen with two neighbours on either side: then it is 5."""

    name = "neighbours-seen"
    context = 2

    def score(self, view: CacheView) -> Any:
        near = np.abs(view.indices[:, None] - view.indices[None, :]) <= 2
        return np.broadcast_to(near.sum(1).astype(np.float32), view.shape)


@pytest.mark.parametrize("granularity", ["token", "head"])
def test_scores_that_look_at_neighbours_see_them_across_batches_evictions_and_rewinds(
    granularity: str, random_model: Maker, load: Loader
) -> None:
    llm = load(
        random_model(LLAMA).path,
        n_ctx=2000,
        kv_budget=100,
        reserve=156,
        recent=20,
        n_batch=50,
        policy=NeighboursSeen(),
        granularity=granularity,
    )

    def check() -> None:
        table = llm.kv.snapshot()
        tokens = np.broadcast_to(table.indices(), (2, 2, table.kept))
        final = tokens[:, :, : table.scores.shape[2]]
        assert final.shape[2] >= table.n_packed
        inner = final >= 2  # the first two tokens have fewer neighbours for ever
        assert (table.scores[inner] == 5).all()

    for token_count in (256, 60, 130, 1, 200):
        llm.eval(random_tokens(token_count + 1)[1:])
        check()
    llm.n_tokens -= 5
    llm.eval(random_tokens(301)[1:])
    check()
    assert llm.kv_stats.evictions >= 4


def test_a_policy_that_returns_the_wrong_shape_is_refused_and_nothing_is_lost(
    random_model: Maker, load: Loader
) -> None:
    class Wrong(Policy):
        name = "wrong"

        def score(self, view: CacheView) -> Any:
            return np.zeros(3, np.float32)

    llm = load(random_model(LLAMA).path, n_ctx=999, kv_budget=100, reserve=156, policy=Wrong())
    llm.eval(random_tokens(256))
    with pytest.raises(ValueError, match=r"'wrong' returned scores of shape \(3,\)"):
        llm.eval([7])
    assert llm.kv_stats.kept == 256


# -- it never overflows, and says what it did --------------------------------------------------


@examples(25)
@given(data=st.data())
def test_any_reading_rewinding_and_clearing_keeps_table_and_cells_equal(
    random_model: Maker, data: st.DataObject
) -> None:
    budget = data.draw(st.integers(40, 150))
    llm = kvp_edge.Llama(
        random_model(LLAMA).path,
        n_ctx=3000,
        kv_budget=budget,
        reserve=data.draw(st.integers(1, 100)),
        recent=data.draw(st.integers(1, 30)),
        sinks=data.draw(st.integers(0, 8)),
        policy=data.draw(st.sampled_from(sorted(POLICIES))),
        granularity=data.draw(st.sampled_from(["token", "head"])),
        verbose=False,
        n_threads=1,
        n_threads_batch=1,
    )
    try:
        for _ in range(data.draw(st.integers(1, 5))):
            action = data.draw(st.sampled_from(["read", "read", "rewind", "reset"]))
            if action == "read":
                llm.eval(random_tokens(data.draw(st.integers(0, 400)) + 1)[1:])
            elif action == "reset":
                llm.reset()
            else:
                length = data.draw(st.integers(0, llm.n_tokens))
                if llm.kv.can_rewind(length):
                    llm.n_tokens = length
                    llm.eval([9])
            check_stats(llm)
            held = llm.kv.snapshot().llama_positions()
            assert llm.kv_indices.shape[-1] == len(held)
            positions, _, _ = llm.kv.cache.read(0, 10**6, len(held), values=False)
            np.testing.assert_array_equal(positions, held)
    finally:
        llm.close()


def test_a_prompt_that_exactly_fills_the_cells_evicts_nothing_and_one_more_does(
    random_model: Maker, load: Loader
) -> None:
    llm = load(random_model(LLAMA).path, n_ctx=999, kv_budget=100, n_batch=64)
    assert llm.kv_stats.cells == 512
    llm.eval(random_tokens(512))
    assert (llm.kv_stats.evictions, llm.kv_stats.kept) == (0, 512)
    llm.eval([7])
    assert (llm.kv_stats.evictions, llm.kv_stats.kept) == (1, 101)


def test_a_reserve_of_one_cell_works_token_by_token(random_model: Maker, load: Loader) -> None:
    llm = load(random_model(LLAMA).path, n_ctx=999, kv_budget=255, reserve=1, n_ubatch=1)
    llm.eval(random_tokens(300))
    assert llm.kv_stats.cells == 256
    assert llm.kv_stats.evictions == 300 - 256
    check_stats(llm)


@pytest.mark.parametrize("recall", ["reply", "off"])
@pytest.mark.parametrize("kv_budget", [6, 8, 16])
def test_a_budget_of_a_few_tokens_works_by_itself(
    random_model: Maker, load: Loader, kv_budget: int, recall: str
) -> None:
    asked = {"kv_budget": kv_budget, "granularity": "head", "recall": recall}
    llm = load(random_model(LLAMA).path, n_ctx=2000, **asked)
    prompt = random_tokens(900)
    llm.eval(prompt)
    llm.evict()
    held = llm.kv_indices
    assert held.shape[-1] == kv_budget
    assert (held[..., :4] == np.arange(4)).all(), "the sinks"
    assert (held[..., -1] == 899).all()
    written = llm.generate([*prompt, *random_tokens(9, seed=1)], temp=0.0)
    assert len(list(itertools.islice(written, 300))) == 300, "over another eviction"
    assert (llm.kv_stats.recalled > 0) == (recall == "reply")
    check_stats(llm)


def test_a_whole_book_through_512_cells(bundled_model: str, load: Loader, book: str) -> None:
    events: list[kvp_edge.Eviction] = []
    llm = load(bundled_model, n_ctx=10**6, kv_budget=256, on_evict=events.append, policy="keydiff")
    tokens = llm.tokenize(book.encode())
    bytes_before = llm.kv_stats.kv_bytes
    for at in range(0, len(tokens), 1000):
        llm.eval(tokens[at : at + 1000])
        check_stats(llm)
    stats = llm.kv_stats
    assert stats.seen == len(tokens) > 30_000
    assert stats.cells == 512
    assert stats.kv_bytes == bytes_before
    assert len(events) == stats.evictions > 100
    assert sum(e.n_dropped for e in events) == stats.dropped
    dropped = np.concatenate([np.arange(a, b) for e in events for a, b in e.dropped])
    assert len(np.unique(dropped)) == len(dropped) == stats.dropped
    assert not np.isin(dropped, llm.kv_indices).any()


@pytest.mark.slow
def test_a_whole_novel_takes_no_more_memory_at_its_end(bundled_model: str, load: Loader) -> None:
    resource = pytest.importorskip("resource")  # noqa: TID251 (not of Windows)
    novel = beside("data/books/Doyle_Hound_1902.txt").read_text(encoding="utf-8-sig")
    llm = load(bundled_model, n_ctx=10**6, kv_budget=256)
    tokens = llm.tokenize(novel.encode())
    llm.eval(tokens[:5000])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    llm.eval(tokens[5000:])
    check_stats(llm)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert after - before < 8 * 1024  # KiB: token ids of the text, and nothing that grows with it


def test_kv_bytes_are_what_llama_cpp_reports(random_model: Maker, load: Loader) -> None:
    from kvp_edge.llamacpp.log import listen

    with listen(pass_on=False) as log:
        llm = load(random_model(LLAMA).path, n_ctx=9999, kv_budget=2000, verbose=True)
    ((mib, cells),) = log.kv_mib()
    assert cells == llm.kv_stats.cells
    assert llm.kv_stats.kv_bytes == pytest.approx(mib * 2**20, abs=0.01 * 2**20)


def test_a_budget_in_memory_is_not_exceeded(bundled_model: str, load: Loader) -> None:
    llm = load(bundled_model, n_ctx=99_999, kv_budget="3MiB")
    assert 2 * 2**20 < llm.kv_stats.kv_bytes <= 3 * 2**20


def test_models_with_a_sliding_window_are_bounded_too(random_model: Maker, load: Loader) -> None:
    shape = ModelShape("gemma3", n_layer=4, sliding_window=24)
    model = random_model(shape)
    llm = load(
        model.path, n_ctx=999, kv_budget=100, reserve=156, recent=40, logits_all=True, n_batch=64
    )
    reader = Reader(llm)
    tokens = random_tokens(300)
    llm.eval(tokens)
    assert llm.kv.cache.shape.has_window == 1
    assert llm.kv_stats.evictions >= 1
    want = model.reference.logits(tokens, visible=reader.matrix())
    assert np.abs(llm.scores[:300] - want).max() / want.std() < 2 * F16_LOGITS


# -- conversations -----------------------------------------------------------------------------


def chat(llm: kvp_edge.Llama, messages: list[Any], **kwargs: Any) -> dict[str, Any]:
    kwargs = {"max_tokens": 24, "temperature": 0.0, **kwargs}
    result: dict[str, Any] = llm.create_chat_completion(messages, **kwargs)
    messages.append(result["choices"][0]["message"])
    return result


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the batches that are decoded from now on."""
    sizes: list[int] = []
    decode = llama_cpp._internals.LlamaContext.decode

    def count(self: Any, batch: Any) -> None:
        sizes.append(batch.n_tokens())
        decode(self, batch)

    monkeypatch.setattr(llama_cpp._internals.LlamaContext, "decode", count)
    return sizes


def n_decoded_reply(result: dict[str, Any]) -> int:
    """Tokens of a reply that were decoded: of one cut at max_tokens, the last never is."""
    cut: bool = result["choices"][0]["finish_reason"] == "length"
    return int(result["usage"]["completion_tokens"]) - cut


def test_a_follow_up_turn_reads_only_its_new_tokens_after_evictions(
    bundled_model: str, load: Loader, book: str, decoded: list[int]
) -> None:
    llm = load(bundled_model, n_ctx=20_000, kv_budget=256)
    messages = [{"role": "user", "content": book[2000:8000]}]
    chat(llm, messages)
    assert llm.kv_stats.evictions > 0
    seen = llm.kv_stats.seen
    messages.append({"role": "user", "content": "And then?"})
    decoded.clear()
    result = chat(llm, messages)
    new_tokens = result["usage"]["prompt_tokens"] - seen
    assert 0 < new_tokens < 20
    assert sum(decoded) == new_tokens + n_decoded_reply(result)


def test_real_dialogues_run_to_their_end_under_a_smaller_cache(
    bundled_model: str, load: Loader, dialogues: list[list[dict[str, str]]]
) -> None:
    llm = load(bundled_model, n_ctx=50_000, kv_budget=150, reserve=106, recent=40)
    for dialogue in dialogues:
        messages: list[Any] = []
        for message in dialogue:
            messages.append(message)
            if message["role"] == "user":
                result = llm.create_chat_completion(messages, max_tokens=8, temperature=0.0)
                assert result["choices"][0]["finish_reason"] in ("stop", "length")
                check_stats(llm)
        assert llm.kv_stats.seen > llm.kv_stats.cells
        assert llm.kv_stats.dropped > 0


@pytest.mark.slow
def test_all_oasst_dialogues_run_to_their_end(bundled_model: str, load: Loader) -> None:
    trees = beside("data/dialogue/oasst_en100/en_100_tree.jsonl")
    llm = load(bundled_model, n_ctx=50_000, kv_budget=150, reserve=106, recent=40)
    for line in trees.read_text(encoding="utf-8").splitlines():
        message, messages = json.loads(line)["prompt"], []
        while message:
            role = "user" if message["role"] == "prompter" else "assistant"
            messages.append({"role": role, "content": message["text"]})
            if role == "user":
                llm.create_chat_completion(messages, max_tokens=8, temperature=0.0)
                check_stats(llm)
            message = message["replies"][0] if message["replies"] else None


def test_a_regenerated_answer_inside_the_recent_window_is_exact_and_reads_one_token(
    bundled_model: str, load: Loader, book: str, decoded: list[int]
) -> None:
    llm = load(bundled_model, n_ctx=20_000, kv_budget=256, recent=128)
    prompt = llm.tokenize(book[2000:6000].encode())
    first = llm.create_completion(prompt, max_tokens=20, temperature=0.0)
    decoded.clear()
    again = llm.create_completion(prompt, max_tokens=20, temperature=0.0)
    assert again["choices"][0]["text"] == first["choices"][0]["text"]
    answer = llm.n_tokens - len(prompt)  # tokens of it that were read
    assert 0 < answer < 20
    assert sum(decoded) == 1 + answer  # the prompt's last token, for its logits


def test_a_rewind_is_as_if_the_rest_had_never_been_read(random_model: Maker, load: Loader) -> None:
    """Read 300, go on to 310, go back to 300, read something else: as straight to it."""
    path = random_model(LLAMA).path
    settings: dict[str, Any] = {"n_ctx": 999, "kv_budget": 100, "reserve": 156, "n_batch": 50}
    back, straight = load(path, **settings), load(path, **settings)
    tokens, other = random_tokens(310), random_tokens(20, seed=8)
    for llm, detour in ((back, 310), (straight, 300)):
        llm.eval(tokens[:detour])
        llm.n_tokens = 300
        llm.eval(other)
    np.testing.assert_array_equal(back.kv_indices, straight.kv_indices)
    a, b = (np.ctypeslib.as_array(m._ctx.get_logits(), (320,)).copy() for m in (back, straight))
    # tokens may lie in other cells, which changes the order of summation and nothing else
    np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("granularity", ["head", "token"])
@pytest.mark.parametrize("n_prompt", [230, 255, 256, 257])  # of 256 cells
def test_an_answer_during_which_something_was_dropped_is_regenerated_as_after_a_reset(
    random_model: Maker, load: Loader, decoded: list[int], granularity: str, n_prompt: int
) -> None:
    """What came before the answer could be seen when its first token was chosen."""
    bound = {"n_ctx": 999, "kv_budget": 100, "recent": 60, "reserve": 156}
    llm = load(random_model(LLAMA).path, granularity=granularity, **bound)
    prompt = random_tokens(n_prompt)

    def answer() -> tuple[list[int], Any]:
        tokens = list(itertools.islice(llm.generate(prompt, temp=0.0), 50))
        return tokens, llm.kv_indices

    first, kept = answer()
    assert llm.kv_stats.evictions == 1
    decoded.clear()
    again, kept_again = answer()
    assert again == first
    np.testing.assert_array_equal(kept_again, kept)
    # 257: the eviction made room for the end of the prompt, which all of the answer has seen
    read_again = n_prompt if n_prompt < 257 else 1
    assert sum(decoded) == read_again + 49


def test_a_conversation_goes_on_right_after_an_eviction_without_being_read_again(
    random_model: Maker, load: Loader, decoded: list[int]
) -> None:
    llm = load(random_model(LLAMA).path, n_ctx=999, kv_budget=100, recent=60)
    llm.eval(random_tokens(300))
    llm.evict()
    decoded.clear()
    next(llm.generate([*random_tokens(300), 7], temp=0.0))
    assert decoded == [1]


def test_an_edited_early_message_is_read_again_from_the_start(
    bundled_model: str, load: Loader, book: str, decoded: list[int]
) -> None:
    llm = load(bundled_model, n_ctx=20_000, kv_budget=256)
    fresh = load(bundled_model, n_ctx=20_000, kv_budget=256)
    messages = [{"role": "user", "content": "Hello. " + book[2000:8000]}]
    chat(llm, messages)
    assert llm.kv_stats.evictions > 0
    edited = [{"role": "user", "content": "Good morning. " + book[2000:8000]}]
    decoded.clear()
    result = chat(llm, edited)
    assert sum(decoded) == result["usage"]["prompt_tokens"] + n_decoded_reply(result)
    again = chat(fresh, [{"role": "user", "content": "Good morning. " + book[2000:8000]}])
    assert result["choices"][0]["message"] == again["choices"][0]["message"]
    np.testing.assert_array_equal(llm.kv_indices, fresh.kv_indices)


def test_a_rewind_past_dropped_tokens_is_refused_not_faked(
    random_model: Maker, load: Loader
) -> None:
    llm = load(random_model(LLAMA).path, n_ctx=999, kv_budget=100, recent=20)
    llm.eval(random_tokens(600))
    llm.n_tokens = 50
    with pytest.raises(KVCacheError, match="cannot be rewound to 50 tokens"):
        llm.eval([7])
    llm.reset()
    llm.eval(random_tokens(50))
    check_stats(llm)


def test_half_of_a_template_marker_is_never_kept(
    bundled_model: str, load: Loader, dialogues: list[list[dict[str, str]]]
) -> None:
    """With ChatML spelled in ordinary tokens, every marker takes many of them."""
    llm = load(
        bundled_model,
        n_ctx=50_000,
        kv_budget=200,
        reserve=56,
        recent=20,
        sinks=3,
        policy="random",
        chat_format="chatml",
    )
    checked = 0

    def check(_: kvp_edge.Eviction) -> None:
        nonlocal checked
        held = np.zeros(llm.kv.seen, np.bool_)
        held[llm.kv_indices] = True
        for start, end, _ in llm.find_spans(0, llm.kv.seen):
            assert held[start:end].all() or not held[start:end].any()
            checked += end - start > 4

    llm.kv.on_evict = check
    for dialogue in dialogues[3:]:
        llm.create_chat_completion(dialogue, max_tokens=4, temperature=0.0)
    assert checked > 10


def test_a_protected_system_prompt_is_kept_whole(
    bundled_model: str, load: Loader, book: str
) -> None:
    llm = load(
        bundled_model,
        n_ctx=20_000,
        kv_budget=256,
        policy="recency",
        protect_system=True,
        chat_format="chatml",
    )
    system = "You answer in the voice of an old sailor, and never in verse."
    messages = [
        {"role": "system", "content": system},
        {"role": "user", "content": book[2000:8000]},
    ]
    chat(llm, messages)
    assert llm.kv_stats.evictions > 0
    text = b"".join(token_text(llm.vocab, int(llm.input_ids[p])) for p in llm.kv_indices)
    assert text.startswith(b"<s><|im_start|>system\n" + system.encode())


def test_a_system_prompt_too_long_to_protect_is_refused_before_anything_is_read(
    bundled_model: str, load: Loader, book: str, decoded: list[int]
) -> None:
    llm = load(
        bundled_model, n_ctx=20_000, kv_budget=256, protect_system=True, chat_format="chatml"
    )
    messages = [
        {"role": "system", "content": book[:3000]},
        {"role": "user", "content": "Hello"},
    ]
    decoded.clear()
    with pytest.raises(
        BudgetError, match=r"system prompt takes \d+ tokens.*is too small. Raise it to"
    ):
        llm.create_chat_completion(messages, max_tokens=4)
    assert decoded == []


# -- it tells ----------------------------------------------------------------------------------


def test_results_carry_the_cache_statistics(bundled_model: str, load: Loader, book: str) -> None:
    llm = load(bundled_model, n_ctx=20_000, kv_budget=256)
    prompt = book[2000:5000]
    done = llm.create_completion(prompt, max_tokens=4)
    assert done["kv_cache"] == dict(llm.kv_stats)
    assert json.loads(json.dumps(done["kv_cache"]))["dropped"] > 0
    *_, last = llm.create_completion(prompt, max_tokens=4, stream=True)
    assert last["kv_cache"]["cells"] == 512
    messages = [{"role": "user", "content": "Hello"}]
    assert llm.create_chat_completion(messages, max_tokens=4)["kv_cache"]["cells"] == 512
    *_, last = llm.create_chat_completion(messages, max_tokens=4, stream=True)
    assert last["kv_cache"]["policy"] == "learned"


def test_stats_read_as_attributes_mapping_and_sentence(bundled_model: str, load: Loader) -> None:
    stats = load(bundled_model, n_ctx=999, kv_budget=256).kv_stats
    assert stats["cells"] == stats.cells
    assert {"seen", "kept", "dropped", "evictions", "cells", "kv_bytes", "eviction_ms"} <= set(
        stats
    )
    assert f"0 tokens seen, 0 kept in 512 cells ({stats.kv_bytes / 2**20:.1f} MiB)" in str(stats)


def test_a_stopped_stream_does_not_lose_the_conversation(
    bundled_model: str, load: Loader, book: str
) -> None:
    llm = load(bundled_model, n_ctx=20_000, kv_budget=256)
    messages = [{"role": "user", "content": book[2000:5000]}]
    stream = llm.create_chat_completion(messages, max_tokens=50, stream=True, temperature=0.0)
    for _ in range(5):
        next(stream)
    stream.close()
    seen = llm.kv_stats.seen
    messages.append({"role": "user", "content": "Go on."})
    llm.create_chat_completion(messages, max_tokens=5)
    assert llm.kv_stats.seen > seen
    check_stats(llm)


@pytest.mark.parametrize("where", ["before", "after"])
def test_an_interrupt_around_a_removal_ends_in_a_clean_re_read(
    where: str, random_model: Maker, load: Loader
) -> None:
    llm = load(random_model(LLAMA).path, n_ctx=999, kv_budget=100, recent=8)
    untouched = load(random_model(LLAMA).path, n_ctx=999, kv_budget=100, recent=8)
    remove = llm.kv.cache.remove

    def interrupted(*args: Any) -> int:
        if where == "after":
            remove(*args)
        raise KeyboardInterrupt

    tokens = random_tokens(700)
    llm.kv.cache.remove = interrupted
    with pytest.raises(KeyboardInterrupt):
        llm.eval(tokens)
    llm.kv.cache.remove = remove
    for model in (llm, untouched):
        model.create_completion(tokens, max_tokens=5, temperature=0.0)
    np.testing.assert_array_equal(llm.kv_indices, untouched.kv_indices)
    check_stats(llm)


def test_an_interrupt_right_after_decoding_is_made_good(random_model: Maker, load: Loader) -> None:
    llm = load(random_model(LLAMA).path, n_ctx=999, kv_budget=100)
    append = llm.kv.append

    def interrupted(n: int) -> None:
        raise KeyboardInterrupt

    llm.kv.append = interrupted
    with pytest.raises(KeyboardInterrupt):
        llm.eval(random_tokens(30))
    llm.kv.append = append
    llm.eval([7])
    assert llm.kv_stats.seen == 31
    check_stats(llm)


def test_a_prompt_asked_again_after_an_interrupted_reply_gets_the_same_reply(
    random_model: Maker, load: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while llama.cpp decodes comes when it is done. Then its logits are those after a token
    that does not count, while the prompt is read and nothing needs to be."""
    llm = load(random_model(LLAMA).path, n_ctx=999, kv_budget=100)
    prompt = list(random_tokens(60))
    want = llm.create_completion(prompt, max_tokens=5, temperature=0.0)["choices"]
    llm.reset()
    decode = llm._ctx.decode

    def interrupted(batch: Any) -> None:
        decode(batch)
        if llm.n_tokens == len(prompt):
            raise KeyboardInterrupt

    monkeypatch.setattr(llm._ctx, "decode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.create_completion(prompt, max_tokens=5, temperature=0.0)
    monkeypatch.setattr(llm._ctx, "decode", decode)
    assert llm.n_tokens == len(prompt)
    assert llm.create_completion(prompt, max_tokens=5, temperature=0.0)["choices"] == want


def test_an_error_of_llama_cpp_leaves_the_conversation_readable(
    random_model: Maker, load: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = load(random_model(LLAMA).path, n_ctx=999, kv_budget=100)
    llm.eval(random_tokens(300))
    decode = llm._ctx.decode

    def fails(_: Any) -> None:
        raise RuntimeError("llama_decode returned -3")

    monkeypatch.setattr(llm._ctx, "decode", fails)
    says = "could not read 300 tokens after the first 300: llama_decode returned -3"
    with pytest.raises(KVCacheError, match=says):
        llm.eval(random_tokens(300))
    monkeypatch.setattr(llm._ctx, "decode", decode)
    llm.eval(random_tokens(300))
    assert llm.kv_stats.seen == 600
    check_stats(llm)


# -- states ------------------------------------------------------------------------------------


def test_a_saved_state_continues_token_for_token(random_model: Maker, load: Loader) -> None:
    llm = load(random_model(LLAMA).path, n_ctx=2000, kv_budget=100)
    llm.eval(random_tokens(500))
    state = llm.save_state()
    kept = llm.kv_indices
    tokens = list(random_tokens(500))

    def go_on() -> Any:
        result = llm.create_completion([*tokens, 50, 51], max_tokens=30, temperature=0.0)
        return result["choices"]

    first = go_on()
    llm.reset()
    llm.eval(random_tokens(300, seed=4))
    llm.load_state(state)
    np.testing.assert_array_equal(llm.kv_indices, kept)
    assert go_on() == first


def test_llama_cpp_pythons_prompt_cache_works(bundled_model: str, load: Loader, book: str) -> None:
    llm = load(bundled_model, n_ctx=20_000, kv_budget=256)
    llm.set_cache(llama_cpp.LlamaRAMCache())
    prompts = [book[2000:5000], book[9000:12000]]
    first = [llm.create_completion(p, max_tokens=10, temperature=0.0)["choices"] for p in prompts]
    again = [llm.create_completion(p, max_tokens=10, temperature=0.0)["choices"] for p in prompts]
    assert first == again
    check_stats(llm)


def test_a_state_without_a_table_is_refused(random_model: Maker, load: Loader, plain: Any) -> None:
    path = random_model(LLAMA).path
    other = plain(path, n_ctx=256)
    other.eval(random_tokens(5))
    with pytest.raises(ValueError, match="saved without a bounded cache"):
        load(path, n_ctx=999, kv_budget=100).load_state(other.save_state())


def test_a_model_object_can_be_pickled(random_model: Maker, load: Loader) -> None:
    llm = load(random_model(LLAMA).path, n_ctx=999, kv_budget=100, policy="recency", sinks=2)
    copy = pickle.loads(pickle.dumps(llm))
    try:
        assert copy.n_ctx() == 999
        assert copy.kv_stats == llm.kv_stats
        assert copy.kv.limits == llm.kv.limits
    finally:
        copy.close()


# -- refused with a sentence -------------------------------------------------------------------


def test_a_prompt_beyond_the_logical_context_is_refused(random_model: Maker, load: Loader) -> None:
    llm = load(random_model(LLAMA).path, n_ctx=600, kv_budget=100)
    with pytest.raises(ContextLengthError, match="prompt has 600 tokens.*n_ctx=600"):
        llm.create_completion(random_tokens(600), max_tokens=1)
    with pytest.raises(ContextLengthError, match="601"):
        llm.eval(random_tokens(601))
    llm.eval(random_tokens(600))
    with pytest.raises(ContextLengthError, match="600 tokens were read, and 1 more"):
        llm.eval([7])


def test_generation_stops_at_the_logical_context(random_model: Maker, load: Loader) -> None:
    llm = load(random_model(LLAMA).path, n_ctx=600, kv_budget=100)
    result = llm.create_completion(random_tokens(500), max_tokens=None, temperature=0.0)
    assert result["usage"]["total_tokens"] == 600
    assert result["choices"][0]["finish_reason"] == "length"


def test_the_logical_context_defaults_to_what_the_model_was_trained_for(
    random_model: Maker, load: Loader
) -> None:
    path = random_model(LLAMA).path
    assert load(path, kv_budget=100).n_ctx() == LLAMA.n_ctx_train
    assert load(path, kv_budget=100, n_ctx=0).n_ctx() == LLAMA.n_ctx_train


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"kv_budget": 68, "recent": 64}, "must be larger than sinks \\+ recent"),
        ({"kv_budget": 250, "reserve": 6, "n_batch": 7}, "n_batch=7 does not fit into the 6 cells"),
        ({"kv_budget": "1KiB"}, "too small"),
        ({"kv_budget": 256, "policy": "nope"}, "unknown policy 'nope'"),
        ({"kv_budget": 256, "granularity": "word"}, "granularity must be .*'word'"),
        ({"kv_budget": 256, "embedding": True}, "embedding=True"),
    ],
)
def test_impossible_settings_are_refused(
    wrong: dict[str, Any], match: str, random_model: Maker, load: Loader
) -> None:
    with pytest.raises(ValueError, match=match):
        load(random_model(LLAMA).path, n_ctx=2000, **wrong)


def test_missing_truncated_and_foreign_files_are_refused(
    random_model: Maker, tmp_path: Path, load: Loader
) -> None:
    with pytest.raises(UnsupportedModelError, match="model file .* not found"):
        load(str(tmp_path / "none.gguf"), kv_budget=100)
    whole = Path(random_model(LLAMA).path).read_bytes()
    cut = tmp_path / "cut.gguf"
    for size in (10, len(whole) // 2, len(whole) - 1):
        cut.write_bytes(whole[:size])
        for budget in (100, None):
            with pytest.raises(UnsupportedModelError):
                load(str(cut), kv_budget=budget, n_ctx=512)
    foreign = tmp_path / "foreign.gguf"
    foreign.write_text("not a model at all " * 100)
    with pytest.raises(UnsupportedModelError, match="cannot be read as a GGUF"):
        load(str(foreign), kv_budget=100)


def test_models_that_cannot_be_bounded_are_refused(tmp_path: Path, load: Loader) -> None:
    write_mamba(tmp_path / "mamba.gguf")
    write_bert(tmp_path / "bert.gguf")
    with pytest.raises(UnsupportedModelError, match="recurrent"):
        load(str(tmp_path / "mamba.gguf"), kv_budget=100, n_ctx=512)
    with pytest.raises(UnsupportedModelError, match="'bert'"):
        load(str(tmp_path / "bert.gguf"), kv_budget=100, n_ctx=512)
