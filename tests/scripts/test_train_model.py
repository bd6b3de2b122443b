"""Training of the bundled model: data without leaks, exact resume, agreement with llama.cpp."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from support.packages import needs

torch = needs("torch", "train")
needs("tokenizers", "train")

from scripts.train_model import config, tasks, tokenizer  # noqa: E402
from scripts.train_model.__main__ import main  # noqa: E402
from scripts.train_model.books import clean, read_library  # noqa: E402
from scripts.train_model.model import Model, causal_mask, rotary_tables  # noqa: E402
from scripts.train_model.ngram import KneserNey  # noqa: E402
from scripts.train_model.phrases import HELD_OUT  # noqa: E402
from scripts.train_model.prepare import Corpus, prepare  # noqa: E402
from scripts.train_model.train import batch, rate  # noqa: E402
from scripts.train_model.wordings import MOST  # noqa: E402
from support.books import write_books  # noqa: E402


@pytest.fixture(scope="module")
def books(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_books(tmp_path_factory.mktemp("books"))


@pytest.fixture(scope="module")
def corpus(books: Path, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return prepare(books, tmp_path_factory.mktemp("corpus"), config.SMOKE)


def text_of(corpus: Corpus, ids: list[int]) -> str:
    return corpus.tokenizer.decode(ids, skip_special_tokens=False)


def test_books_are_cleaned_to_ascii_paragraphs() -> None:
    raw = (
        "CHAPTER I\r\n\r\n\u201cCaf\u00e9,\u201d he\r\nsaid \u2014 and went away at once.\r\n\r\n12"
    )
    assert clean(raw) == '"Cafe," he said - and went away at once.'


def test_held_out_books_are_apart_and_a_folder_without_books_is_refused(
    books: Path, tmp_path: Path
) -> None:
    library = read_library(books)
    assert list(library.held_out) == ["Doyle_Hound_1902"]
    assert "Doyle_Hound_1902" not in library.train
    with pytest.raises(SystemExit, match=r"No .*books"):
        read_library(tmp_path)


def test_tokens_decode_to_the_same_text_and_short_numbers_are_one_token(corpus: Corpus) -> None:
    text = "The dog saw 481220 caf\u00e9s.\nThen 97!"
    ids = corpus.tokenizer.encode(text).ids
    assert corpus.tokenizer.decode(ids) == text
    assert len(corpus.tokenizer.encode("481220").ids) == 2
    assert corpus.tokenizer.encode("<s><|user|>").ids == [tokenizer.BOS, tokenizer.USER]


def test_held_out_words_names_and_wordings_never_occur_in_training(corpus: Corpus) -> None:
    train, held_out = corpus.train_pools, corpus.held_out_pools
    assert held_out.words
    assert held_out.names
    assert not set(train.words + train.names) & set(held_out.words + held_out.names)
    for field in (
        "number_nouns",
        "word_nouns",
        "needles",
        "questions",
        "all_values",
        "several_keys",
        "assignments",
        "variable_value",
        "variable_names",
        "pairs",
        "list_openings",
        "list_questions",
        "acknowledgements",
    ):
        assert not set(getattr(MOST, field)) & set(getattr(HELD_OUT, field)), field
    for seen in MOST.facts:
        for new in HELD_OUT.facts:
            assert not set(seen.subjects) & set(new.subjects)
            assert not set(seen.statements + seen.questions) & set(new.statements + new.questions)


def test_made_up_words_are_used_in_training_and_are_never_held_out_ones(corpus: Corpus) -> None:
    maker = corpus.maker(held_out=False)
    real = {*corpus.train_pools.words, *corpus.train_pools.names}
    held_out = {w.lower() for w in corpus.held_out_pools.words + corpus.held_out_pools.names}
    maker.seed(2)
    assert {maker.word() for _ in range(50)} <= real
    maker.invented = 1.0
    invented = {maker.word() for _ in range(500)}
    assert len(invented - real) > 300
    assert not invented & held_out
    assert maker.name()[0].isupper()


@pytest.mark.parametrize("task", tasks.TASKS)
@pytest.mark.parametrize("length", [129, 1025])
@pytest.mark.parametrize("held_out", [False, True])
def test_every_task_fills_the_length_and_repeats_with_its_seed(
    corpus: Corpus, task: str, length: int, held_out: bool
) -> None:
    maker, other = corpus.maker(held_out), corpus.maker(held_out)
    for n in range(5):
        maker.seed(3, n)
        other.seed(3, n)
        ids, classes = tasks.sample(maker, {task: 1.0}, length)
        assert len(ids) == len(classes) == length
        assert ids[0] == tokenizer.BOS
        assert (ids, classes) == tasks.sample(other, {task: 1.0}, length)
    maker.seed(3, 99)
    assert tasks.sample(maker, {task: 1.0}, length)[0] != ids


@pytest.mark.parametrize(
    "skill",
    ["needle", "queries", "values", "listing", "lookup", "facts", "told", "variables", "names"],
)
@pytest.mark.parametrize(("held_out", "loose"), [(False, 0.0), (True, 0.0), (False, 1.0)])
def test_every_answer_stands_in_the_text_before_the_question(
    corpus: Corpus, skill: str, held_out: bool, loose: float
) -> None:
    maker = corpus.maker(held_out)
    maker.loose = loose
    for n in range(20):
        maker.seed(5, n)
        item = tasks.CHATS[skill](maker, 400)
        if item is None:
            continue
        context = text_of(corpus, item.context)
        for turn in item.turns:
            assert turn.question[-1] == tokenizer.ASSISTANT
            assert turn.answer[-1] == tokenizer.END
            answer = text_of(corpus, turn.answer[:-1])
            values = re.findall(r"(?:[:,=]| is| called| in) ([\w-]+)(?=[,.]| =)", answer)
            assert values
            for value in values:
                assert value in context


def test_values_are_listed_in_the_order_of_their_appearance(corpus: Corpus) -> None:
    maker = corpus.maker(held_out=True)
    for n in range(10):
        maker.seed(7, n)
        item = maker.needle(500, keys=2, values=3, asked=1)
        assert item is not None
        values = text_of(corpus, item.turns[0].answer[:-1]).rstrip(".").split(": ")[1].split(", ")
        context = text_of(corpus, item.context)
        places = [context.index(f" {value}.") for value in values]
        assert len(values) == 3
        assert places == sorted(places)


def test_loose_wordings_have_a_few_small_words_more_and_lose_nothing(corpus: Corpus) -> None:
    maker = corpus.maker(held_out=False)
    wordings = [" The {n} of {k} is {v}.", "Which {n} does {k} have?", " {k}: {v}."]
    maker.seed(4)
    assert all(maker.worded(wordings) in wordings for _ in range(20))
    maker.loose = 1.0
    for _ in range(200):
        loose = maker.worded(wordings)
        own = next(w for w in wordings if re.findall(r"{\w}", w) == re.findall(r"{\w}", loose))
        left = iter(re.findall(r"[^\s.?]+|[.?]", loose))
        assert all(word in left for word in re.findall(r"[^\s.?]+|[.?]", own))
        assert 1 <= len(loose.split()) - len(own.split()) <= 3
        assert loose[0] == own[0]
        assert loose[-1] == own[-1]


def test_successions_list_all_values_of_a_key_in_order(corpus: Corpus) -> None:
    maker = corpus.maker(held_out=False)
    maker.seed(6)
    ids, classes = maker.successions(400)
    stop, told = maker.prose.stop, dict[int, list[int]]()
    rows = " ".join(map(str, ids[1:])).split(f" {stop} ")
    listed = 0
    for row in rows[:-1]:  # the last one may be cut
        key, *values = map(int, row.split())
        if len(values) == 1:
            told.setdefault(key, []).append(values[0])
        else:
            assert values == told[key]
            listed += len(values) + 1
    assert listed <= sum(classes) <= listed + 5


def test_packed_chats_each_begin_a_text_and_end_with_an_answer(corpus: Corpus) -> None:
    maker = corpus.maker(held_out=False)
    for n in range(5):
        maker.seed(8, n)
        ids, classes = maker.packed(1000)
        begins = [i for i, token in enumerate(ids) if token == tokenizer.BOS]
        assert begins[0] == 0
        assert len(begins) > 2
        for end in [*begins[1:], len(ids)]:
            assert ids[end - 1] == tokenizer.END
            assert classes[end - 1] == tasks.ANSWERED


def test_a_needle_put_into_prose_does_not_change_how_the_text_is_tokenised(corpus: Corpus) -> None:
    maker = corpus.maker(held_out=True)
    for n in range(10):
        maker.seed(11, n)
        item = maker.needle(400, keys=3, asked=1)
        assert item is not None
        ids = item.context + item.turns[0].question
        # The excerpt may begin within a word; every later token must come back.
        assert corpus.tokenizer.encode(text_of(corpus, ids)).ids[-350:] == ids[-350:]


def test_the_data_of_a_step_depends_on_seed_and_step_alone(corpus: Corpus) -> None:
    stage = config.SMOKE.stages[1]
    one = batch(corpus.maker(False), stage, seed=1, step=4)
    maker = corpus.maker(False)
    batch(maker, stage, seed=1, step=3)
    assert all(torch.equal(a, b) for a, b in zip(one, batch(maker, stage, 1, 4), strict=True))


def test_the_learning_rate_warms_up_and_follows_the_stages() -> None:
    stages = (config.Stage(64, 1, 640, {}), config.Stage(64, 1, 640, {}, rates=(1.0, 0.0)))
    recipe = config.Recipe(config.SMOKE.model, stages, warmup_steps=4)
    rates = [rate(step, recipe) for step in range(20)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[10:12] == pytest.approx([1.0, 0.9])
    assert rates[-1] == pytest.approx(0.1)


def test_kneser_ney_probabilities_sum_to_one_and_learn_repetition() -> None:
    ids = np.array([0, 1, 2, 0, 1, 2, 0, 1, 1, 2, 0, 1, 2], np.uint16)
    model = KneserNey(ids, vocab_size=3, order=3)
    for context in ([0, 1], [2, 2], [1, 0]):
        total = sum(model.probabilities(np.array([*context, w], np.uint16))[-1] for w in range(3))
        assert total == pytest.approx(1.0)
    assert model.perplexity(ids) < 1.7


def test_attention_written_out_equals_the_fused_kernel() -> None:
    torch.manual_seed(0)
    model = Model(config.SMOKE.model)
    for block in model.blocks:
        torch.nn.init.normal_(block.o.weight, std=0.1)
    ids = torch.randint(0, 2048, (2, 40))
    cos, sin = rotary_tables(config.SMOKE.model, 40)
    with torch.no_grad():
        fused = model(ids, cos, sin, None)
        torch.testing.assert_close(model(ids, cos, sin, causal_mask(40)), fused)
        for weights in model.attention(ids):
            torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 40))


def test_wilson_interval_eviction_ranges_and_protected_tokens() -> None:
    from random import Random

    from scripts.train_model.evaluate import Score, gaps, kept

    low, high = Score(95, 100).interval()
    assert (low, high) == pytest.approx((0.8882, 0.9785), abs=1e-3)
    assert gaps([0, 1, 5, 9], 12) == [(2, 5), (6, 9), (10, 12)]
    for policy in ("random", "recency"):
        keep = kept(policy, 400, 50, Random(0))
        assert len(keep) == 50
        assert {0, 1, 2, 3, *range(368, 400)} <= set(keep)
    assert kept("recency", 400, 50, Random(0))[4:] == list(range(354, 400))


def test_sink_mass_is_one_for_a_model_that_looks_only_at_the_first_token() -> None:
    from scripts.train_model.evaluate import sink_mass

    class FirstOnly:
        config = config.SMOKE.model

        def attention(self, ids):
            weights = torch.zeros(1, 2, ids.shape[1], ids.shape[1])
            weights[..., 0] = 1.0
            return [weights, weights]

    np.testing.assert_allclose(sink_mass(FirstOnly(), [list(range(20))]), 1.0)


@pytest.mark.slow
def test_smoke_run_resumes_exactly_and_its_file_agrees_with_llama_cpp(
    books: Path, tmp_path: Path
) -> None:
    import llama_cpp

    common = ["--books", str(books), "--smoke", "--device", "cpu", "--threads", "1"]
    main([*common, "--out", str(tmp_path / "whole")])
    main([*common, "--out", str(tmp_path / "parts"), "--stop-after", "9"])
    main([*common, "--out", str(tmp_path / "parts"), "--resume"])
    for file_type in ("f32", "f16", "q8_0"):
        name = f"bookworm-4m-{file_type}.gguf"
        whole, parts = tmp_path / "whole" / name, tmp_path / "parts" / name
        assert whole.read_bytes() == parts.read_bytes(), name

    figures = json.loads((tmp_path / "whole" / "figures.json").read_text())
    assert figures["logits, f32 file"]["largest"] < 0.02 * figures["logits, f32 file"]["scale"]

    llama = llama_cpp.Llama(
        str(tmp_path / "whole" / "bookworm-4m-f16.gguf"), n_ctx=256, verbose=False
    )
    assert llama.metadata["general.name"] == "Bookworm 4M"
    assert llama.metadata["general.license"] == "mit"
    text = "<s><|user|>The dog saw 481220. What?<|end|><|assistant|>"
    ours = (tmp_path / "whole" / "tokenizer.json").read_text()
    from tokenizers import Tokenizer

    expected = Tokenizer.from_str(ours).encode(text).ids
    assert llama.tokenize(text.encode(), add_bos=False, special=True) == expected
    reply = llama.create_chat_completion([{"role": "user", "content": "Hello."}], max_tokens=4)
    assert reply["choices"][0]["message"]["role"] == "assistant"
