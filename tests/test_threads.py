"""One Llama serves one call at a time, many may live in many threads, and a closed one says so."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest

import kvp_edge
from conftest import RandomModel, random_tokens
from kvp_edge import InUseError, KVCacheError, Llama, UnsupportedModelError
from kvp_edge.argument_checks import MAX_THREADS
from kvp_edge.llamacpp.log import listen
from kvp_edge.policies import get_policy
from makers.gguf_models import ModelShape

ROOT = Path(__file__).parents[1]
Loader = Callable[..., Llama]
Maker = Callable[[ModelShape], RandomModel]

SMALL = ModelShape()
LIMITS: dict[str, Any] = {"n_ctx": 2000, "kv_budget": 100, "reserve": 156, "n_batch": 64}


@pytest.fixture
def path(random_model: Maker) -> str:
    return random_model(SMALL).path


def in_another_thread(do: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(do).result(120)


#: Everything that a model can be asked to do.
CALLS: dict[str, Callable[[Llama], Any]] = {
    "eval": lambda m: m.eval([7]),
    "reset": lambda m: m.reset(),
    "evict": lambda m: m.evict(),
    "sample": lambda m: m.sample(temp=0.0),
    "generate": lambda m: next(m.generate([1, 2], temp=0.0)),
    "create_completion": lambda m: m.create_completion("a", max_tokens=1),
    "a streamed completion": lambda m: next(m.create_completion("a", max_tokens=1, stream=True)),
    "create_chat_completion": lambda m: m.create_chat_completion(
        [{"role": "user", "content": "a"}], max_tokens=1
    ),
    "save_state": lambda m: m.save_state(),
    "load_state": lambda m: m.load_state(llama_cpp.LlamaState(*[None] * 6)),
    "save_session": lambda m: m.save_session("never written"),
    "load_session": lambda m: m.load_session("there is none"),
    "embed": lambda m: m.embed("a"),
    "create_embedding": lambda m: m.create_embedding("a"),
}
#: What only tells, and is possible at any time.
TELLS: dict[str, Callable[[Llama], Any]] = {
    "kv_stats": lambda m: m.kv_stats,
    "kv_indices": lambda m: m.kv_indices,
    "tokenize": lambda m: m.tokenize(b"a"),
    "detokenize": lambda m: m.detokenize([9]),
}
NATIVE: dict[str, Callable[[Llama], Any]] = {
    "n_vocab": lambda m: m.n_vocab(),
    "n_embd": lambda m: m.n_embd(),
    "token_eos": lambda m: m.token_eos(),
    "token_bos": lambda m: m.token_bos(),
    "token_nl": lambda m: m.token_nl(),
    "pooling_type": lambda m: m.pooling_type(),
    "tokenizer": lambda m: m.tokenizer().tokenize(b"a"),
    "ctx": lambda m: m.ctx,
    "model": lambda m: m.model,
}


def _method(name: str) -> str:
    return {"a streamed completion": "create_completion", "create_embedding": "embed"}.get(
        name, name
    )


@contextmanager
def held_in_eval(path: str, load: Loader) -> Iterator[Llama]:
    """A model that another thread is reading with, in the middle of an eviction."""
    inside, leave = threading.Event(), threading.Event()

    def wait(_: Any) -> None:
        inside.set()
        leave.wait(120)

    llm = load(path, on_evict=wait, **LIMITS)
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(llm.eval, random_tokens(300))
        assert inside.wait(120)
        try:
            yield llm
        finally:
            leave.set()
        reading.result(120)


def test_while_one_thread_reads_all_others_are_refused_and_what_tells_tells(
    path: str, load: Loader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with held_in_eval(path, load) as llm:
        for name, call in CALLS.items():
            with pytest.raises(InUseError, match=f"{_method(name)}.* while 'eval' is running in a"):
                call(llm)
        with pytest.raises(InUseError, match="'close' was called while 'eval'"):
            llm.close()
        for tell in TELLS.values():
            tell(llm)
    undisturbed = load(path, **LIMITS)
    undisturbed.eval(random_tokens(300))
    np.testing.assert_array_equal(llm.kv_indices, undisturbed.kv_indices)
    next_tokens = [next(m.generate([*random_tokens(300), 9], temp=0.0)) for m in (llm, undisturbed)]
    assert next_tokens[0] == next_tokens[1]
    assert list(tmp_path.iterdir()) == []


def test_two_threads_that_ask_for_replies_get_one_reply_and_one_refusal(
    bundled_model: str, load: Loader
) -> None:
    llm = load(bundled_model, n_ctx=2000, kv_budget=128, n_batch=64)
    want = llm.create_completion("The dog", max_tokens=30, temperature=0.0)["choices"][0]["text"]
    llm.reset()

    def reply() -> str | None:
        try:
            reply = llm.create_completion("The dog", max_tokens=30, temperature=0.0)
        except InUseError:
            return None
        return str(reply["choices"][0]["text"])

    with ThreadPoolExecutor(4) as pool:
        replies = [p.result(120) for p in [pool.submit(reply) for _ in range(12)]]
    assert set(replies) <= {want, None}
    assert want in replies


# -- callbacks ---------------------------------------------------------------------------------


def test_on_evict_may_look_and_save_but_not_change(path: str, load: Loader, tmp_path: Path) -> None:
    seen = []

    def on_evict(event: kvp_edge.Eviction) -> None:
        for tell in TELLS.values():
            tell(llm)
        assert llm.kv_stats.kept == event.kept
        for name in ("eval", "reset", "evict", "generate", "create_completion", "load_session"):
            with pytest.raises(InUseError, match="was called inside 'eval'"):
                CALLS[name](llm)
        with pytest.raises(InUseError, match="'close' was called inside 'eval'"):
            llm.close()
        llm.save_session(tmp_path / "a.kvp")
        seen.append((llm.n_tokens, llm.kv_indices.copy()))

    llm = load(path, on_evict=on_evict, **LIMITS)
    llm.eval(random_tokens(300))
    assert len(seen) == 1
    other = load(path, **LIMITS)
    other.load_session(tmp_path / "a.kvp")
    assert other.n_tokens == seen[0][0]
    np.testing.assert_array_equal(other.kv_indices, seen[0][1])
    other.eval(random_tokens(300)[other.n_tokens :])
    np.testing.assert_array_equal(other.kv_indices, llm.kv_indices)


@pytest.mark.parametrize("kv_budget", [100, None], ids=["bounded", "unbounded"])
def test_a_stopping_criterion_may_look_but_not_change(
    bundled_model: str, load: Loader, kv_budget: int | None
) -> None:
    def criterion(tokens: Any, logits: Any) -> bool:
        assert llm.kv_stats.seen == llm.n_tokens
        llm.reset()
        return True

    llm = load(bundled_model, n_ctx=600, kv_budget=kv_budget)
    for stream in (False, True):
        with pytest.raises(InUseError, match="'reset' was called inside"):
            list(
                llm.create_completion(
                    "The dog",
                    max_tokens=3,
                    stream=stream,
                    stopping_criteria=llama_cpp.StoppingCriteriaList([criterion]),
                )
            )
    by_position = [40, 0.95, 0.05, 1.0, 0.8, 1.0, True, 0.0, 0.0, 1.0, 0, 0.1, 5.0, True, None]
    with pytest.raises(InUseError):
        list(llm.generate([1, 2], *by_position, criterion))
    assert llm.create_completion("The dog", max_tokens=3)["choices"][0]["text"]


def test_a_logits_processor_may_not_change(
    bundled_model: str, load: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm, refused = load(bundled_model, n_ctx=600, kv_budget=100), []

    def process(tokens: Any, logits: Any) -> Any:
        with pytest.raises(InUseError) as error:
            llm.eval([7])
        refused.append(error)
        return logits

    processors = llama_cpp.LogitsProcessorList([process])
    llm.create_completion("The dog", max_tokens=3, logits_processor=processors)
    assert refused


# -- streams -----------------------------------------------------------------------------------


def pieces(stream: Iterator[Any]) -> str:
    return "".join(chunk["choices"][0]["text"] for chunk in stream)


def test_a_stream_leaves_the_model_free_between_its_pieces(
    bundled_model: str, load: Loader, tmp_path: Path
) -> None:
    llm = load(bundled_model, n_ctx=600, kv_budget=100, reserve=156)
    how = {"max_tokens": 12, "temperature": 0.0, "stream": True}
    want = pieces(llm.create_completion("The old dog", **how))
    llm.reset()
    stream, got = llm.create_completion("The old dog", **how), ""
    for chunk in stream:
        got += chunk["choices"][0]["text"]
        in_another_thread(lambda: llm.save_session(tmp_path / "a.kvp"))
        llm.evict()
        in_another_thread(lambda: llm.kv_stats)
    assert got == want


def test_a_stream_does_not_go_on_in_the_text_of_another(bundled_model: str, load: Loader) -> None:
    llm = load(bundled_model, n_ctx=600, kv_budget=100)
    how = {"max_tokens": 12, "temperature": 0.0, "stream": True}
    want = pieces(llm.create_completion("The sea", **how))
    llm.reset()
    first = llm.create_completion("The old dog", **how)
    next(first)
    second = llm.create_completion("The sea", **how)
    begin = next(second)["choices"][0]["text"]
    with pytest.raises(InUseError, match="cannot continue"):
        next(first)
    assert begin + pieces(second) == want


def test_a_streamed_chat_does_not_lose_its_system_prompt_to_another(
    bundled_model: str, load: Loader
) -> None:
    llm = load(bundled_model, n_ctx=600, kv_budget=200, protect_system=True)
    user = {"role": "user", "content": "Who?"}
    messages = [{"role": "system", "content": "You are a very old dog."}, user]
    stream = llm.create_chat_completion(messages, max_tokens=3, stream=True)
    llm.create_chat_completion([user], max_tokens=3)
    assert llm.kv.protected_prefix == 4
    list(stream)
    assert llm.kv.protected_prefix > 8


def test_forgotten_streams_cost_nothing(bundled_model: str, load: Loader) -> None:
    llm = load(bundled_model, n_ctx=600, kv_budget=100)
    kept = []
    for i in range(6):
        stream = llm.create_completion(f"Dog {i}", max_tokens=9, stream=True)
        next(stream)
        kept.append(stream)
        if i % 2:
            del stream
            kept.pop()
            gc.collect()
    assert llm.create_completion("The dog", max_tokens=2)["choices"][0]["text"]
    llm.close()
    with pytest.raises(RuntimeError, match="was closed"):
        next(kept[0])


# -- after close -------------------------------------------------------------------------------


@pytest.mark.parametrize("limits", [LIMITS, {"n_ctx": 500}], ids=["bounded", "unbounded"])
@pytest.mark.parametrize("name", [*CALLS, *TELLS, *NATIVE])
def test_every_call_after_close_is_refused_with_a_sentence(
    path: str, load: Loader, name: str, limits: dict[str, Any]
) -> None:
    llm = load(path, **limits)
    llm.eval(random_tokens(20))
    llm.close()
    llm.close()
    with pytest.raises(RuntimeError, match="this model was closed"):
        {**CALLS, **TELLS, **NATIVE}[name](llm)


def test_a_closed_model_can_still_be_copied(path: str, load: Loader) -> None:
    llm = load(path, **LIMITS)
    llm.close()
    again = copy.copy(llm)
    again.eval(random_tokens(20))
    assert again.kv_stats.seen == 20
    again.close()


# -- several models ----------------------------------------------------------------------------


def kept(llm: Llama, text: bytes, n: int = 250) -> Any:
    llm.eval(llm.tokenize(text)[:n])
    llm.evict()
    return llm.kv_indices.copy()


DOG, SNOW = b"The old man went to the sea. My dog is Rex. " * 60, b"Snow fell on the roofs. " * 60


@pytest.mark.parametrize("name", ["snapkv", "h2o", "expected-attention"])
def test_a_policy_that_looks_at_queries_serves_several_models(
    bundled_model: str, load: Loader, name: str
) -> None:
    limits = {**LIMITS, "granularity": "head", "reserve": 200}
    want = [kept(load(bundled_model, policy=name, **limits), text) for text in (DOG, SNOW)]
    policy = get_policy(name)
    first, second = (load(bundled_model, policy=policy, **limits) for _ in range(2))
    third = copy.copy(first)
    for llm in (first, second, third):
        llm.eval(llm.tokenize(DOG if llm is first else SNOW)[:250])
    for llm, positions in ((second, want[1]), (first, want[0]), (third, want[1])):
        llm.evict()
        np.testing.assert_array_equal(llm.kv_indices, positions)
    third.close()


def test_a_policy_object_keeps_nothing_of_the_models_that_it_serves(
    path: str, load: Loader
) -> None:
    policy = get_policy("h2o")
    before = dict(vars(policy))
    for llm in (load(path, policy=policy, **LIMITS) for _ in range(2)):
        kept(llm, SNOW)
        assert llm.kv.policy is policy
    assert vars(policy) == before


def test_a_learned_policy_is_shared_by_models_in_threads(bundled_model: str, load: Loader) -> None:
    limits = {**LIMITS, "granularity": "head", "reserve": 200}
    policy = get_policy("auto", bundled_model)
    assert policy.name == "learned"
    want = [kept(load(bundled_model, policy=policy, **limits), text) for text in (DOG, SNOW)]
    models = [load(bundled_model, policy=policy, **limits) for _ in range(2)]

    def read(llm: Llama, text: bytes) -> list[Any]:
        found = []
        for _ in range(15):
            llm.reset()
            found.append(kept(llm, text))
        return found

    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(read, *pair) for pair in zip(models, (DOG, SNOW), strict=True)]
        for reading, positions in zip(running, want, strict=True):
            for got in reading.result(120):
                np.testing.assert_array_equal(got, positions)


def test_a_thread_hears_the_log_of_its_own_loading(path: str, tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF and nothing else")

    def load(name: Path | str) -> list[str]:
        with listen(pass_on=False) as log:
            for _ in range(5):
                model = llama_cpp.llama_model_load_from_file(
                    str(name).encode(), llama_cpp.llama_model_default_params()
                )
                if model:
                    llama_cpp.llama_model_free(model)
        return [text for level, text in log.lines if level == 4]

    before = logged_to()
    with ThreadPoolExecutor(2) as pool:
        bad, good = (pool.submit(load, name) for name in (tmp_path / "bad.gguf", path))
        assert bad.result(60)
        assert good.result(60) == []
    assert logged_to() == before


def logged_to() -> tuple[int | None, int | None]:
    import ctypes

    callback, data = llama_cpp.llama_log_callback(), ctypes.c_void_p()
    llama_cpp.llama_log_get(ctypes.byref(callback), ctypes.byref(data))
    return ctypes.cast(callback, ctypes.c_void_p).value, data.value


def test_a_listener_inside_another_passes_on_to_it_and_both_leave_no_trace() -> None:
    before = logged_to()
    with listen(pass_on=False) as outer:
        with listen(pass_on=True) as inner:
            llama_cpp.llama_model_load_from_file(b"no file", llama_cpp.llama_model_default_params())
        n = len(outer.lines)
        llama_cpp.llama_model_load_from_file(b"no file", llama_cpp.llama_model_default_params())
    assert inner.lines == outer.lines[:n]
    assert len(outer.lines) == 2 * n > 0
    assert logged_to() == before


def test_models_are_loaded_one_at_a_time_and_leave_stdout_where_it_was(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the base class sends stdout and stderr of the process elsewhere meanwhile
    plain, inside, most = llama_cpp._internals.LlamaModel.__init__, [0], [0]

    def slow(self: Any, **how: Any) -> None:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        time.sleep(0.02)
        try:
            plain(self, **how)
        finally:
            inside[0] -= 1

    monkeypatch.setattr(llama_cpp._internals.LlamaModel, "__init__", slow)
    out = sys.stdout, sys.stderr

    def load() -> None:
        for _ in range(3):
            Llama(path, verbose=False, n_threads=1, **LIMITS).close()

    with ThreadPoolExecutor(3) as pool:
        for done in [pool.submit(load) for _ in range(3)]:
            done.result(120)
    assert most == [1]
    assert (sys.stdout, sys.stderr) == out


def stress(*how: str) -> dict[str, int]:
    """What scripts/stress_threads.py counted; a crash would be this process's otherwise."""
    script = ROOT / "scripts" / "stress_threads.py"
    command = [sys.executable, str(script), *how]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    counts = (part.rsplit(" ", 1) for part in done.stdout.strip().split(", "))
    return {name: int(n) for name, n in counts}


def test_many_threads_and_models_at_once() -> None:
    counts = stress("--rounds", "2")
    for job in ("writing", "saved", "looking", "closing"):
        assert counts[job] >= 2
    assert counts["loading"] == 4


@pytest.mark.slow
def test_many_threads_and_models_for_a_minute() -> None:
    counts = stress("--seconds", "60")
    for job in ("loading", "writing", "looking", "closing", "saved", "writing: refused"):
        assert counts[job] > 0


# -- sessions ----------------------------------------------------------------------------------


def test_a_cache_that_is_not_what_its_table_says_is_not_saved(
    path: str, load: Loader, tmp_path: Path
) -> None:
    llm, file = load(path, **LIMITS), tmp_path / "a.kvp"
    llm.eval(random_tokens(300))
    llm.save_session(file)
    good = file.read_bytes()
    llm._ctx.kv_cache_seq_rm(-1, llm.n_tokens - 7, llm.n_tokens - 3)  # behind its back
    with pytest.raises(KVCacheError, match="does not match its table"):
        llm.save_session(file)
    assert file.read_bytes() == good
    assert list(tmp_path.iterdir()) == [file]


# -- arguments ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        ({"sinks": 1.5}, "sinks must be a whole number of tokens, not 1.5"),
        ({"recent": 2.5}, "recent must be a whole number of tokens, not 2.5"),
        ({"reserve": "many"}, "reserve must be a whole number of tokens, not 'many'"),
        ({"n_batch": 1.5}, "n_batch must be a whole number of tokens, not 1.5"),
        ({"n_ctx": 1e3}, "n_ctx must be a whole number of tokens, not 1000.0"),
        ({"kv_budget": 99.5}, "kv_budget must be a whole number of tokens, not 99.5"),
        ({"type_k": "f16"}, "type_k must be a whole number of ggml's types"),
        ({"type_v": "f16"}, "type_v must be a whole number of ggml's types"),
        ({"on_evict": 5}, "on_evict must be a function, not 5"),
        ({"n_threads": 2.0}, "n_threads must be a whole number of threads, not 2.0"),
    ],
)
@pytest.mark.parametrize("bounded", [True, False])
def test_arguments_of_another_type_are_refused_before_anything_is_loaded(
    argument: dict[str, Any], sentence: str, bounded: bool
) -> None:
    limits = LIMITS if bounded else {}
    with pytest.raises(TypeError, match=sentence):
        Llama("there is none", **{**limits, **argument})


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        ({"n_ctx": 2**31}, "n_ctx=2147483648 is more than the 2147483647 tokens"),
        ({"kv_budget": 10**30}, "kv_budget=1000000000000000000000000000000 is more than"),
        ({"kv_budget": "9" * 400 + "GiB"}, "more memory than any machine has"),
        ({"kv_budget": "9" * 30 + "GiB"}, "more memory than any machine has"),
        ({"n_threads": MAX_THREADS + 1}, "n_threads must be from 1 to 512"),
        ({"n_threads_batch": 10**6}, "n_threads_batch must be from 1 to 512"),
        ({"n_threads": -1}, "n_threads must be from 1 to 512"),
    ],
)
def test_numbers_that_no_machine_has_are_refused(
    path: str, argument: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        Llama(path, verbose=False, **{**LIMITS, **argument})


def test_numbers_at_the_limit_and_of_numpy_are_taken(path: str, load: Loader) -> None:
    limits = {**LIMITS, "n_ctx": np.int64(2000), "sinks": np.int32(4)}
    llm = load(path, n_threads=MAX_THREADS, **limits)
    assert llm.n_threads == MAX_THREADS
    load(path, n_threads=None, n_threads_batch=0, **LIMITS).eval([1])


@pytest.mark.parametrize("limits", [LIMITS, {"n_ctx": 500}], ids=["bounded", "unbounded"])
def test_a_lora_adapter_that_is_none_is_refused(
    path: str, tmp_path: Path, limits: dict[str, Any]
) -> None:
    with pytest.raises(UnsupportedModelError, match="LoRA adapter file '.*typo.gguf' not found"):
        Llama(path, lora_path=str(tmp_path / "typo.gguf"), verbose=False, **limits)
    other = tmp_path / "other.gguf"
    for content in (b"", b"no adapter", Path(path).read_bytes()):
        other.write_bytes(content)
        with pytest.raises(UnsupportedModelError, match="LoRA adapter '.*other.gguf' cannot be lo"):
            Llama(path, lora_path=str(other), verbose=False, **limits)
