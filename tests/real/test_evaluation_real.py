"""Evaluations of models that people use: how they are asked; what they reply is their own."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing

import pytest

from kvp_edge.evaluation import run
from kvp_edge.evaluation.tasks import TASKS
from kvp_edge.llama import Llama
from kvp_edge.text.pieces import token_text
from support.own_replies import ENGINE, assert_replies_are_llama_cpps

pytestmark = pytest.mark.real

#: What a conversation begins with, what a turn of the user's and of the model's begin with.
FORMS = {
    "smollm2": ("<|im_start|>system\n", "<|im_start|>user\n", "<|im_start|>assistant\n"),
    "qwen": ("<|im_start|>system\n", "<|im_start|>user\n", "<|im_start|>assistant\n"),
    "gemma": ("<bos>User: ", "User: ", "Assistant:"),
}


@pytest.mark.parametrize("name", FORMS)
def test_conversations_are_written_as_the_model_knows_them(
    real_model: Callable[[str], str], name: str
) -> None:
    begin, user, model = FORMS[name]
    with closing(Llama(real_model(name), n_ctx=256, **ENGINE)) as llm:
        for prompt in run.prompts(llm, TASKS, ["fact", "recall", "quiz"], 400, 1, seed=0):
            assert prompt.item is not None
            pieces = [token_text(llm._model.vocab, t) for t in prompt.tokens.tolist()]
            written = b"".join(pieces).decode()
            assert written.startswith(begin)
            assert written.endswith(model)
            asked = [m for m in prompt.item.messages if m["role"] == "user"]
            assert written.count(user) == len(asked)
            assert written.count(model) == len(prompt.item.messages) - len(asked) + 1
            after = b"".join(pieces[prompt.border :]).decode().strip()
            assert after.startswith(prompt.item.question)


@pytest.mark.parametrize("name", FORMS)
def test_the_full_caches_reply_is_llama_cpps_own(
    real_model: Callable[[str], str], name: str
) -> None:
    assert_replies_are_llama_cpps(real_model(name), ["recall"], 200)
