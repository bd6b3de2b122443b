"""A chat that has grown is not tokenized again, and its tokens are those of the whole text."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import llama_cpp
import pytest
from gguf import TokenType
from hypothesis import given
from hypothesis import strategies as st

from kvp_edge import Llama
from kvp_edge.text.token_memory import WORTH_BYTES, PromptTokens, TokenMemory, isolated, marks
from makers.gguf_models import write_vocabulary
from support.properties import examples

Loader = Callable[..., Llama]
Vocabulary = tuple[Any, list[bytes]]  # llama_cpp's model, and what texts are made of

CONTROL, USER = TokenType.CONTROL, TokenType.USER_DEFINED

#: name -> how it is written. All have tokens that are no place to cut at, too: they overlap each
#: other or <|end|>-like pieces, strip white space, or are white space.
VOCABULARIES: dict[str, dict[str, Any]] = {
    "bpe": {
        "kind": "bpe",
        "special": {
            **{"<|user|>": CONTROL, "<|end|>": CONTROL, "ab": USER, "bab": USER, "[MASK]": CONTROL},
            **{"\n\n": USER, "|>the": USER},
        },
    },
    "strips behind": {
        "kind": "bpe",
        "name": "phi-3",
        "special": dict.fromkeys(["<|user|>", "<|end|>", "<unk>", "<|endoftext|>"], CONTROL)
        | {" a": USER},
    },
    "strips before": {
        "kind": "bpe",
        "name": "modern-bert",
        "special": {"<|end|>": CONTROL, "[MASK]": CONTROL, " a": USER},
    },
    "spm": {
        "kind": "spm",
        "special": {"<|user|>": CONTROL, "<|end|>": CONTROL, "\n\n": USER, "[MASK]": USER},
    },
}


@pytest.fixture(scope="module", params=VOCABULARIES)
def vocabulary(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Iterator[Vocabulary]:
    path = tmp_path_factory.mktemp("vocabulary") / "v.gguf"
    how = VOCABULARIES[request.param]
    write_vocabulary(path, **how)
    llm = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    special = [s.encode() for s in (*how["special"], "<s>", "</s>")]
    yield llm._model, special
    llm.close()


def pieces_of(special: list[bytes]) -> st.SearchStrategy[bytes]:
    """What texts are made of: special tokens, halves of them, and letters and white space."""
    halves = [s[:n] for s in special for n in range(1, len(s))] + [
        s[-n:] for s in special for n in (1, 2)
    ]
    plain = [b" ", b"\n", b"  ", b"a", b"b", b"the", b" in", b"\xc3\xa9", b"\xf0\x9f\x98\x80"]
    return st.sampled_from([*special * 3, *sorted(set(halves)), *plain * 3])


@pytest.mark.parametrize("add_bos", [False, True])
def test_tokens_are_those_of_the_whole_text_however_it_grew_and_was_edited(
    vocabulary: Vocabulary, add_bos: bool
) -> None:
    model, special = vocabulary
    cut_at = marks(model.vocab, b"\0".join(special))
    assert cut_at
    tokenize = partial(model.tokenize, special=True)

    @examples(60)
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        memory = TokenMemory(tokenize, cut_at, piece=data.draw(st.sampled_from([1, 10])))
        parts: list[bytes] = []
        for _ in range(data.draw(st.integers(1, 4))):
            parts = parts[: data.draw(st.integers(0, len(parts)))]
            parts += data.draw(st.lists(pieces_of(special), max_size=12))
            text = b"".join(parts)
            lent = data.draw(st.booleans())
            got = memory.lend(text, add_bos) if lent else memory.tokens(text, add_bos)
            assert got == tokenize(text, add_bos=add_bos), text
            memory.take_back()
            ids = memory.ids(got)
            assert ids is not None
            assert ids.tolist() == got

    check()


def test_where_texts_are_cut(vocabulary: Vocabulary, request: pytest.FixtureRequest) -> None:
    model, special = vocabulary
    found = marks(model.vocab, b"\0".join(special))
    name = request.node.callspec.params["vocabulary"]
    want = {
        "bpe": [b"[MASK]"],  # the other two may end where "|>the" begins
        "strips behind": [b"<|user|>", b"<|end|>", b"<unk>", b"<|endoftext|>"],
        "strips before": [b"<|end|>"],
        "spm": [b"<|user|>", b"<|end|>", b"[MASK]"],
    }
    assert sorted(found) == sorted([*want[name], b"<s>", b"</s>"])
    assert marks(model.vocab, b"nothing special") == []
    assert b"<|end|>" not in marks(model.vocab, b"<|end|>", whole=b"1<")


def test_texts_that_a_seal_does_not_break_are_not_cut_at(tmp_path: Path) -> None:
    write_vocabulary(tmp_path / "v.gguf", "bpe", {"<|end|>": CONTROL, "é": CONTROL})
    llm = llama_cpp.Llama(str(tmp_path / "v.gguf"), vocab_only=True, verbose=False)
    assert marks(llm._model.vocab, "é<|end|>".encode()) == [b"<|end|>"]
    llm.close()


def test_cutting_at_a_token_that_others_overlap_would_be_wrong(tmp_path: Path) -> None:
    write_vocabulary(tmp_path / "v.gguf", **VOCABULARIES["bpe"])
    llm = llama_cpp.Llama(str(tmp_path / "v.gguf"), vocab_only=True, verbose=False)
    memory = TokenMemory(partial(llm._model.tokenize, special=True), [b"ab"], piece=1)
    assert memory.tokens(b"the bab", False) != llm._model.tokenize(b"the bab", False, True)
    llm.close()


def test_a_tokenizer_that_ends_texts_is_not_cut(tmp_path: Path) -> None:
    write_vocabulary(tmp_path / "v.gguf", "bpe", {"<|end|>": CONTROL}, add_eos=True)
    llm = llama_cpp.Llama(str(tmp_path / "v.gguf"), vocab_only=True, verbose=False)
    assert marks(llm._model.vocab, b"<|end|>") == []
    llm.close()


WORDS = [bytes(w) for n in range(1, 4) for w in itertools.product(b"ab", repeat=n)]


def test_isolated_means_that_no_text_holds_another_one_that_shares_bytes_with_it() -> None:
    def places(word: bytes, text: bytes) -> set[int]:
        return {i for i in range(len(text)) if text.startswith(word, i)}

    texts = [bytes(w) for w in itertools.product(b"ab", repeat=5)]

    def clash(a: bytes, b: bytes) -> bool:
        return any(
            (a != b or i != j) and i < j + len(b) and j < i + len(a)
            for text in texts
            for i in places(a, text)
            for j in places(b, text)
        )

    with_itself = {a: clash(a, a) for a in WORDS}
    for a, b in itertools.product(WORDS, WORDS):
        assert isolated(a, {a, b}) is not (clash(a, b) or with_itself[a]), (a, b)


@pytest.mark.parametrize("text", [b"", b" a", b"a\n", b" "])
def test_what_begins_or_ends_with_white_space_is_not_isolated(text: bytes) -> None:
    assert not isolated(text, [text])


def test_two_tokens_with_the_same_text_are_not_isolated() -> None:
    assert isolated(b"<a>", [b"<a>", b"<b>"])
    assert not isolated(b"<a>", [b"<a>", b"<a>"])


def test_only_what_is_new_is_tokenized(bundled_model: str, load: Loader) -> None:
    llm = load(bundled_model, n_ctx=100_000, kv_budget=256)
    seen: list[int] = []

    def tokenize(text: bytes, add_bos: bool) -> list[int]:
        seen.append(len(text))
        return list(llm._model.tokenize(text, add_bos, True))

    memory = TokenMemory(tokenize, [b"<|end|>"])
    text = b""
    for turn in range(300):
        text += b"<|user|>How are you, %d?<|end|>" % turn
        memory.tokens(text, False)
    assert len(text) > 7000
    assert max(seen) < 2048
    seen.clear()
    memory.tokens(text, False)
    assert sum(seen) < 2048
    memory.tokens(b"<|system|>" + text, False)  # all of it is new, and still it comes in pieces
    assert max(seen) < 2048


def chat(n: int) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": f"  My dog {i} is Rex.\n"} for i in range(n)]


def test_chats_read_the_tokens_of_the_plain_tokenizer(bundled_model: str, load: Loader) -> None:
    llm = load(bundled_model, n_ctx=100_000, kv_budget=256, positions="compact")
    messages = chat(181)
    for n in (119, 121, 181, 123):
        llm.create_chat_completion(messages[:n], max_tokens=1, temperature=0.0)
        text = "".join(f"<|{m['role']}|>{m['content']}<|end|>" for m in messages[:n])
        text = "<s>" + text + "<|assistant|>"
        assert len(text) > WORTH_BYTES
        want = llm._model.tokenize(text.encode(), False, True)
        assert llm.input_ids[: len(want)].tolist() == want
        assert llm.n_tokens == len(want)


def test_an_own_tokenizer_is_asked_for_everything(bundled_model: str, load: Loader) -> None:
    class Own(llama_cpp.llama_tokenizer.LlamaTokenizer):  # type: ignore[misc]
        def tokenize(self, text: bytes, add_bos: bool = True, special: bool = True) -> list[int]:
            return [7, len(text)]

    llm = load(bundled_model, n_ctx=1000, kv_budget=256)
    text = b"<|end|>" * WORTH_BYTES
    llm.tokenizer_ = Own(llm)
    assert llm.tokenize(text, special=True) == [7, len(text)]


def test_what_was_given_may_be_changed(bundled_model: str, load: Loader) -> None:
    llm = load(bundled_model, n_ctx=1000, kv_budget=256)
    text = b"<|user|>Hello.<|end|>" * 300
    first = llm.tokenize(text, special=True)
    want = first.copy()
    first.clear()
    assert llm.tokenize(text, special=True) == want


def test_nothing_is_copied_to_put_a_prompt_together_from_empty_parts() -> None:
    prompt = PromptTokens([1, 2])
    empty: list[int] = []
    assert empty + (prompt + empty) + empty is prompt
    for parts, want in (((prompt, [3]), [1, 2, 3]), (([0], prompt), [0, 1, 2])):
        both = operator.add(*parts)
        assert both == want
        assert type(both) is list
    assert prompt == [1, 2]


def test_a_prompt_belongs_to_its_caller(bundled_model: str, load: Loader) -> None:
    llm = load(bundled_model, n_ctx=1000, kv_budget=256)
    prompt = llm.tokenize(b"My dog is")
    given = prompt.copy()
    llm.create_completion(prompt, max_tokens=3, temperature=0.0)
    assert prompt == given


def test_a_thread_that_comes_in_between_gets_the_right_tokens() -> None:
    def tokenize(text: bytes, _: bool) -> list[int]:
        if not inside:
            inside.append(1)
            nested.append(memory.tokens(b"<a>other<a>text", False))
        return list(text)

    nested: list[list[int]] = []
    inside: list[int] = []
    memory = TokenMemory(tokenize, [b"<a>"], piece=1)
    for text in (b"x<a>y", b"x<a>y<a>z"):
        nested.clear()
        inside.clear()
        got = memory.tokens(text, False)
        assert got == list(text)
        assert nested == [list(b"<a>other<a>text")]
        ids = memory.ids(got)
        assert ids is not None
        assert ids.tolist() == got


def test_what_is_lent_is_nobody_elses_until_it_is_taken_back() -> None:
    memory = TokenMemory(lambda text, _: list(text), [b"<a>"], piece=1)
    lent = memory.lend(b"x<a>y", False)
    assert memory.tokens(b"x<a>yz<a>", False) == list(b"x<a>yz<a>")
    assert lent == list(b"x<a>y")
    memory.take_back()
    assert memory.lend(b"x<a>y<a>z", False) is lent
    assert lent == list(b"x<a>y<a>z")
    assert lent.ids is not None
    assert lent.ids.tolist() == lent


def test_a_chat_reads_the_tokens_also_beside_other_texts(bundled_model: str, load: Loader) -> None:
    llm = load(bundled_model, n_ctx=100_000, kv_budget=256, positions="compact")
    others: list[list[int]] = []
    other = b"<|user|>Hello.<|end|>" * 300

    def look(_tokens: Any, logits: Any) -> Any:  # in the middle of a call
        others.append(llm.tokenize(other, special=True))
        return logits

    processors = llama_cpp.LogitsProcessorList([look])
    how = {"max_tokens": 2, "temperature": 0.0, "logits_processor": processors}
    messages = chat(181)
    for n in (119, 121, 181, 123):
        prompt = prompt_of(messages[:n])
        reply = llm.create_completion(prompt, **how)
        read = llm.input_ids[: llm.n_tokens].tolist()
        llm.reset()
        got = llm.create_chat_completion(messages[:n], **how)
        assert llm.input_ids[: llm.n_tokens].tolist() == read
        assert got["choices"][0]["message"]["content"] == reply["choices"][0]["text"]
        assert got["usage"] == reply["usage"]
    assert others
    assert all(tokens == llm._model.tokenize(other, True, True) for tokens in others)


def prompt_of(messages: list[dict[str, str]]) -> str:
    text = "".join(f"<|{m['role']}|>{m['content']}<|end|>" for m in messages)
    return text + "<|assistant|>"  # create_completion begins it with <s>
