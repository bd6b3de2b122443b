"""What llama_cpp itself replies to the conversations of an evaluation."""

from __future__ import annotations

from contextlib import closing
from typing import Any

from kvp_edge.evaluation import run
from kvp_edge.evaluation.records import FULL
from kvp_edge.evaluation.run import Run
from kvp_edge.evaluation.setting import Setting
from kvp_edge.evaluation.tasks import TASKS
from kvp_edge.llama import Llama
from kvp_edge.text import transcript
from makers.plain_llama import PlainLlama

ENGINE: dict[str, Any] = {"verbose": False, "n_threads": 1, "n_threads_batch": 1}


def assert_replies_are_llama_cpps(path: str, tasks: list[str], length: int) -> None:
    """With the full cache, and up to the end of the line in a transcript."""
    with closing(Llama(path, n_ctx=256, **ENGINE)) as llm:
        prompts = run.prompts(llm, TASKS, tasks, length, 1, seed=0)
        is_transcript = llm.chat_format == transcript.NAME
    longest = max(prompt.longest for prompt in prompts)
    how = Setting("bounded", "unseen", "head", length, longest, None, FULL, True)
    records = list(Run(path, 0, "f16", "f16", ENGINE).records(how, prompts))
    chosen = {"chat_format": transcript.NAME} if is_transcript else {}
    with closing(PlainLlama(path, n_ctx=longest, n_batch=512, **ENGINE, **chosen)) as plain:
        for prompt, record in zip(prompts, records, strict=True):
            assert prompt.item is not None
            plain.reset()
            reply = plain.create_chat_completion(
                prompt.item.messages, temperature=0.0, max_tokens=prompt.reply_tokens
            )["choices"][0]["message"]["content"]
            assert record.reply == (reply.split("\n")[0] if is_transcript else reply)
            assert record.reply
