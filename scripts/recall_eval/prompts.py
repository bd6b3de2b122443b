"""Conversations in tokens of the model: of the length asked for, and with their questions."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping

from kvp_edge.cli.demo_tasks import Prose
from kvp_edge.llama import Llama
from kvp_edge.text.chat_prompt import next_turn, prompt_tokens
from recall_eval.conversations import Conversation, make_conversation

#: Times that a conversation is made to come near its length.
_FITTINGS = 3


def rng_of(seed: int, number: int, length: int) -> random.Random:
    """What conversation ``number`` is drawn from."""
    return random.Random(f"{seed} {number} {length}")


def fitting_conversation(
    llm: Llama,
    kind: str,
    n_facts: int,
    length: int,
    prose: Prose,
    rng: Callable[[], random.Random],
) -> Conversation:
    """A conversation of ``length`` tokens with a question, but for less than a sentence or two:
    these are not cut.

    Args:
        kind: of conversations.KINDS.
        rng: a new one at every call, in the same state.
    """
    filler = length
    for _ in range(_FITTINGS):
        made = make_conversation(kind, n_facts, max(1, filler), prose, rng())
        filler -= len(prompt_of(llm, made, made.questions[0].text)) - length
    return made


def prompt_of(llm: Llama, conversation: Conversation, text: str) -> list[int]:
    """The conversation with ``text`` as its last message."""
    return list(prompt_tokens(llm, [*conversation.messages, {"role": "user", "content": text}]))


def shared_context(llm: Llama, prompts: Mapping[str, list[int]]) -> list[int]:
    """The tokens that all prompts of a conversation begin with, up to the last reply of the
    assistant.

    Args:
        prompts: by the text of their last message.
    """
    one, *others = prompts.values()
    n = min(len(prompt) - len(next_turn(llm, text)) for text, prompt in prompts.items())
    for other in others:
        while one[:n] != other[:n]:
            n -= 1
    return one[:n]
