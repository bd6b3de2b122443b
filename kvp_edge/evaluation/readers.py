"""Models that read conversations, drop tokens as a setting says, and answer questions.

Settings of one-shot mode that differ only in policy and budget have read the same tokens when they
drop some. ``SharedReader`` reads these once and restores them for each setting.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kvp_edge.evaluation.kept_tokens import KeptTokens
from kvp_edge.evaluation.oracle import Oracle
from kvp_edge.evaluation.records import GOLDEN, ORACLE, PARTS, SHIFT
from kvp_edge.evaluation.setting import Prompt, Setting
from kvp_edge.measuring import Bookmark, MeasuringLlama, Shifted
from kvp_edge.policies import Learned, Policy, get_policy
from kvp_edge.policies.policy_of_model import own_policy
from kvp_edge.traces.format import Trace
from kvp_edge.traces.tracer import Tracer

#: The policy trained for the model.
OWN = Learned.name


def shares_reading(setting: Setting) -> bool:
    """Whether the setting can share its reading with others. Context shift drops while it reads, in
    both modes."""
    return setting.mode == "one-shot" and setting.policy != SHIFT


def shares_trace(setting: Setting) -> bool:
    """Whether the setting can share its traces with others."""
    return setting.policy in (ORACLE, GOLDEN)


def reader_of(model: str, settings: Sequence[Setting], engine: Mapping[str, Any]) -> Reader:
    """The reader of settings that differ only in policy and budget and share reading or traces, or
    of a single setting."""
    if all(shares_reading(setting) for setting in settings):
        return SharedReader(model, settings, engine)
    return BoundedReader(model, settings, engine)


def subject_of(model: str, setting: Setting, engine: Mapping[str, Any]) -> MeasuringLlama:
    """The subject of a setting in bounded mode, or of one that drops nothing. The oracles must
    trace a conversation first, so their subject starts with another policy."""
    n_ctx = setting.longest
    if setting.budget is None or shares_reading(setting):
        return MeasuringLlama.whole(model, n_ctx, **engine)
    budget = min(setting.budget, n_ctx)
    if setting.policy == SHIFT:
        return Shifted(model, n_ctx, budget, **engine)
    policy = "recency" if shares_trace(setting) else setting.policy
    return MeasuringLlama(
        model,
        n_ctx,
        budget,
        budget if budget == n_ctx else budget - max(1, budget // 4),
        policy=_named(policy, model),
        **_how(setting),
        **engine,
    )


class Reader(ABC):
    """A model that reads conversations in one or several settings; close it after use."""

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @abstractmethod
    def close(self) -> None:
        """Free the model."""

    @abstractmethod
    def prepare(self, setting: Setting, prompt: Prompt) -> None:
        """Do the work that several settings share, if none has done it yet, so that the time of
        ``read_context`` is that of its own setting."""

    @abstractmethod
    def read_context(self, setting: Setting, prompt: Prompt) -> tuple[MeasuringLlama, int]:
        """Read everything before the question (and the question, if it is seen), and drop tokens.
        Returns the subject, and how many tokens it has read."""

    def ask(self, setting: Setting, prompt: Prompt) -> dict[str, Any]:
        """The results, by the names of a Record."""
        tokens = prompt.tokens.tolist()
        subject, cut = self.read_context(setting, prompt)
        held = {"kept": subject.held, "dropped": cut - subject.held}
        if prompt.item is None:
            losses = subject.losses(tokens[cut:])
            if prompt.measured is not None:
                losses = losses[prompt.measured]
            outcome: dict[str, Any] = {
                "score": round(float(losses.mean()), 6),
                "losses": _by_part(losses),
            }
        else:
            if cut < len(tokens):
                subject.read(tokens[cut:])
            written = subject.converse(prompt.turns, prompt.reply_tokens)
            replies = [subject.text(reply) for reply in written]
            outcome = {"reply": "\n".join(replies), "score": prompt.item.score(*replies)}
        kv_bytes = _kv_bytes(subject, setting)
        return {**held, **outcome, "evictions": subject.evictions, "kv_bytes": kv_bytes}

    def kept_tokens(self, setting: Setting, prompt: Prompt) -> KeptTokens:
        """The tokens that each head keeps when the question comes."""
        subject, n = self.read_context(setting, prompt)
        indices = np.asarray(subject.kv_indices)
        if indices.ndim == 1:
            indices = indices[None, None]
        kept = np.zeros((*indices.shape[:2], n), np.bool_)
        np.put_along_axis(kept, indices, True, axis=2)
        return KeptTokens(
            texts=[subject.text_of(t) for t in prompt.tokens[:n].tolist()],
            kept=kept,
            protected=subject.protected(n),
            title=f"{setting.policy}, {setting.budget} tokens, {prompt.task} {prompt.number}",
        )


class BoundedReader(Reader):
    """Reads every conversation anew in each setting, and drops tokens while reading, or none.

    Args:
        model: GGUF file.
        settings: a single one, or those of the oracles, which trace a conversation once for all.
        engine: the other arguments of kvp_edge.Llama.
    """

    def __init__(self, model: str, settings: Sequence[Setting], engine: Mapping[str, Any]) -> None:
        one_a_budget = {setting.budget: setting for setting in settings}
        self._subjects = {b: subject_of(model, s, engine) for b, s in one_a_budget.items()}
        self._oracles = _Oracles(model, settings[0].longest, engine)

    def close(self) -> None:
        for subject in self._subjects.values():
            subject.close()
        self._oracles.close()

    def prepare(self, setting: Setting, prompt: Prompt) -> None:
        self._decide(setting, prompt)

    def read_context(self, setting: Setting, prompt: Prompt) -> tuple[MeasuringLlama, int]:
        subject, cut = self._decide(setting, prompt), setting.cut(prompt)
        subject.forget()
        subject.read(prompt.tokens[:cut].tolist())
        return subject, cut

    def _decide(self, setting: Setting, prompt: Prompt) -> MeasuringLlama:
        """The subject with the setting's policy."""
        subject = self._subjects[setting.budget]
        if shares_trace(setting):
            subject.policy = self._oracles.of(prompt, setting.policy)
        return subject


class SharedReader(Reader):
    """Reads every conversation once, into a full cache, for all settings of one-shot mode that
    differ only in policy and budget. The full cache may be one of them.

    Each setting starts from the state after reading: llama.cpp's cells, the logits of the last
    token and, for policies by queries, the log of all of them. A policy scores it once for all its
    consecutive budgets. Policies take no part in reading before tokens are dropped, so the results
    equal those of reading anew, bit for bit, except in models with sliding windows: llama.cpp
    restores the cells of a window in another order, which rounds sums differently.

    Args:
        model: GGUF file.
        settings: at least one.
        engine: the other arguments of kvp_edge.Llama.
    """

    def __init__(self, model: str, settings: Sequence[Setting], engine: Mapping[str, Any]) -> None:
        n_ctx = settings[0].longest
        chosen = {s.policy: s for s in settings if s.budget is not None}
        self._policies = {
            name: get_policy(_named(name, model)) for name in chosen if name not in (ORACLE, GOLDEN)
        }
        self._oracles = _Oracles(model, n_ctx, engine)
        self._read: tuple[Prompt, Bookmark] | None = None  # the newest conversation
        self._scored: tuple[str, Bookmark] | None = None  # the same by the newest policy
        if not chosen:
            self._subject = MeasuringLlama.whole(model, n_ctx, **engine)
            return
        # the policy that needs the most preparation at load
        most = max(
            self._policies.values(),
            key=lambda policy: (policy.needs_frequencies, policy.n_queries),
            default=get_policy("recency"),
        )
        self._subject = MeasuringLlama(
            model, n_ctx, n_ctx, n_ctx, policy=most, **_how(settings[0]), **engine
        )
        for policy in self._policies.values():
            self._subject.check(policy)

    def close(self) -> None:
        self._subject.close()
        self._oracles.close()

    def prepare(self, setting: Setting, prompt: Prompt) -> None:
        self._start_of(setting, prompt)

    def read_context(self, setting: Setting, prompt: Prompt) -> tuple[MeasuringLlama, int]:
        subject = self._subject
        subject.go_back(self._start_of(setting, prompt))
        if setting.budget is not None:
            subject.limit(min(setting.budget, setting.longest))
            subject.evict()
        return subject, setting.cut(prompt)

    def _start_of(self, setting: Setting, prompt: Prompt) -> Bookmark:
        """The context, read and (except for the full cache) scored by the setting's policy."""
        subject = self._subject
        if self._read is None or self._read[0] is not prompt:
            self._read = self._scored = None
            subject.forget()
            subject.read(prompt.tokens[: setting.cut(prompt)].tolist())
            self._read = prompt, subject.bookmark()
        state = self._read[1]
        if setting.budget is None:
            return state
        if self._scored is None or self._scored[0] != setting.policy:
            if shares_trace(setting):
                policy: Policy = self._oracles.of(prompt, setting.policy)
            else:
                policy = self._policies[setting.policy]
            subject.go_back(state)
            subject.policy = policy
            self._scored = setting.policy, subject.scored(state)
        return self._scored[1]


class _Oracles:
    """The oracles. Each conversation is traced once for both of them and for all consecutive
    budgets."""

    def __init__(self, model: str, n_ctx: int, engine: Mapping[str, Any]) -> None:
        self._model, self._n_ctx, self._engine = model, n_ctx, engine
        self._tracer: Tracer | None = None
        self._full: MeasuringLlama | None = None  # reads the replies before the last question
        self._traced: tuple[Prompt, Trace] | None = None

    def close(self) -> None:
        for one in (self._tracer, self._full):
            if one is not None:
                one.close()

    def of(self, prompt: Prompt, name: str) -> Oracle:
        """ORACLE or GOLDEN for a conversation."""
        if self._traced is None or self._traced[0] is not prompt:
            self._traced = prompt, self._trace(prompt)
        return Oracle(self._traced[1], peak=name == GOLDEN)

    def _trace(self, prompt: Prompt) -> Trace:
        """The conversation with its last reply, read with a full cache."""
        tokens = self._whole(prompt)
        if self._tracer is None:
            # without flash attention, attention itself is captured, for every kind of model
            plain = {k: v for k, v in self._engine.items() if k != "flash_attn"}
            self._tracer = Tracer(self._model, self._n_ctx, **plain)
        n_reply = prompt.reply_tokens if prompt.item is not None else 0
        return self._tracer.capture(tokens, prompt.border, n_reply).trace(
            prompt.border, prompt.task
        )

    def _whole(self, prompt: Prompt) -> list[int]:
        """The conversation up to its last question, with the replies of the full cache before."""
        tokens: list[int] = prompt.tokens.tolist()
        if not prompt.turns:
            return tokens
        if self._full is None:
            self._full = MeasuringLlama.whole(self._model, self._n_ctx, **self._engine)
        self._full.forget()
        self._full.read(tokens)
        replies = self._full.converse(prompt.turns, prompt.reply_tokens)
        for reply, turn in zip(replies, prompt.turns, strict=False):  # the last one is traced
            tokens += [*reply, *turn]
        return tokens


def _named(policy: str, model: str) -> str:
    """The policy file in place of OWN."""
    return (own_policy(model) or "") if policy == OWN else policy


def _how(setting: Setting) -> dict[str, Any]:
    """Arguments of kvp_edge.Llama that are common to settings which share their reading."""
    return {
        **setting.how,
        **({} if setting.protected else {"sinks": 0, "recent": 1}),
    }


def _kv_bytes(subject: MeasuringLlama, setting: Setting) -> int:
    """Bytes of the most tokens kept at once. Cells that were never used do not count."""
    stats, held = subject.kv_stats, subject.n_tokens
    if setting.mode == "bounded" and setting.budget is not None and subject.evictions:
        held = setting.budget  # it was full; after a context shift n_tokens is what is left
    return stats.kv_bytes * held // stats.cells


def _by_part(losses: npt.NDArray[np.float64]) -> list[float]:
    """The means of PARTS consecutive parts; none if there are fewer tokens than that."""
    if len(losses) < PARTS:
        return []
    return [round(float(part.mean()), 6) for part in np.array_split(losses, PARTS)]
