"""A bounded Llama's conversation with its cache, in a file or in memory, and what is saved of it
when its process must end. What a file looks like: kvp_edge.cache.session_file."""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from kvp_edge.binding.library import BUILT_FOR
from kvp_edge.binding.structs import LogLayout
from kvp_edge.cache import session_file
from kvp_edge.cache.block_records import StoredBlock, layout_numbers
from kvp_edge.cache.kv_log import Block, Bytes, Logged
from kvp_edge.cache.manager import EvictionManager
from kvp_edge.cache.saved_state import SavedState
from kvp_edge.cache.table import Table
from kvp_edge.errors import BudgetError, KVCacheError, SessionError
from kvp_edge.files.records import Array
from kvp_edge.llamacpp.abort_hook import before_abort

if TYPE_CHECKING:
    from kvp_edge.llama import Llama

#: Bytes of a session besides its tokens, keys and values.
_OVERHEAD = 2**24

#: Where a conversation was saved to, or loaded from, last.
_places: weakref.WeakKeyDictionary[Llama, session_file.Place] = weakref.WeakKeyDictionary()

#: The file that was loaded last, if it has a KV log and there is none here to take it.
_logs_left_out: weakref.WeakKeyDictionary[Llama, str] = weakref.WeakKeyDictionary()

#: RoPE's numbers in llama_context_params.
_ROPE = (
    *("rope_scaling_type", "rope_freq_base", "rope_freq_scale", "yarn_ext_factor"),
    *("yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow", "yarn_orig_ctx"),
)


def save(llm: Llama, path: str | os.PathLike[str], extra: Any) -> None:
    """See Llama.save_session."""
    header, arrays, held = conversation(llm, "save_session")
    if len(arrays["tokens"]) == 0:
        raise SessionError("nothing to save: no token has been read")
    _require_no_log_lost(llm, path)
    header["extra"] = extra
    since = _places.get(llm)
    _places[llm] = session_file.write(path, header, arrays, held.blocks, since=since)


def load(llm: Llama, path: str | os.PathLike[str], accept: Callable[[Any], object] | None) -> Any:
    """See Llama.load_session."""
    require_bounded(llm, "load_session")
    # a state has keys and values of no more than all cells, and a few numbers of each
    most = 2 * llm.kv_stats.kv_bytes + 64 * llm.n_ctx() + _OVERHEAD
    with session_file.opened(path, most) as session:
        header, arrays = session.header, session.arrays
        if accept is not None:
            accept(header.get("extra"))
        name = f"the session '{path}'"
        if "rescue" in header:
            _read_again(llm, name, header, arrays)
        else:
            log = _StoredLog(session)
            resume(llm, name, header, arrays, log)
            place = session.place(log.stored)
            if place is not None:
                _places[llm] = place
        _logs_left_out.pop(llm, None)
        if header.get("log") and require_bounded(llm, "load_session").log is None:
            _logs_left_out[llm] = os.path.realpath(path)
    return header["extra"]


def _require_no_log_lost(llm: Llama, path: str | os.PathLike[str]) -> None:
    """Refuse to write over the only copy of a log.

    Raises:
        SessionError: this would.
    """
    left_out = _logs_left_out.get(llm)
    if left_out is None or not os.path.exists(left_out):
        return
    if os.path.realpath(path) == left_out:
        raise SessionError(
            f"'{path}' has a KV log, which was left out when it was loaded, as recall is off here. "
            "To save over it would lose the log: save to another file, or load it with "
            "recall='auto'"
        )


def state(llm: Llama, seed: int) -> SavedState:
    """See Llama.save_state."""
    header, arrays, held = conversation(llm, "save_state")
    rows = llm.n_tokens if llm.keeps_logits else 0
    return SavedState(header, arrays, held, llm.scores[:rows].copy(), seed)


def load_state(llm: Llama, state: Any) -> None:
    """See Llama.load_state."""
    if not isinstance(state, SavedState):
        raise SessionError(
            "this state was saved without a bounded cache, so its tokens are unknown"
        )
    scores = state.scores if llm.keeps_logits else state.scores[:0]
    if len(scores) < state.n_tokens and llm.keeps_logits:
        raise SessionError(
            "this state was saved without logits_all, but here the logits of all tokens are "
            "kept: load the model without logits_all and draft_model to resume it"
        )
    resume(llm, "this state", state.header, state.arrays, _HeldLog(state.held))
    llm.set_seed(state.seed)
    if len(scores):
        llm.keep_logits(0, scores)


def conversation(llm: Llama, name: str) -> tuple[dict[str, Any], dict[str, Array], Logged]:
    """What was read and what is kept of it, for ``resume``: header and arrays of a session, and
    what the KV log holds.

    Args:
        name: of the method, for a sentence.

    Raises:
        SessionError: it cannot be saved.
        KVCacheError: llama.cpp's state is not that of the tokens read.
    """
    kv = _without_queries(llm, name)
    llm.sync()
    table, log = kv.snapshot(), kv.log
    header = {
        "made_with": settings(llm),
        "table": table.numbers(),
        "protected_prefix": kv.protected_prefix,
        "log": log and {"layout": layout_numbers(log.layout), "end": log.end},
        "evictions": kv.evictions,
        "evictions_as_state": kv.evictions_as_state,
        "eviction_ms": kv.eviction_ms,
        "recalls": kv.recalls,
        "recalled": kv.recalled,
        "recall_ms": kv.recall_ms,
        "extra": None,
    }
    arrays = {"tokens": llm.input_ids[: kv.seen].astype(np.int32), **table.arrays()}
    state = kv.cache.state() if kv.seen else np.empty(0, np.uint8)
    if kv.seen:
        kv.cache.check_state(state, table.llama_positions())
    return header, {**arrays, "state": state}, Logged() if log is None else log.held


class SavedLog(Protocol):
    """The blocks of a KV log that was saved."""

    def blocks(self, layout: LogLayout, end: int, seen: int) -> Sequence[Block]:
        """Ascending; they may lack their rows.

        Args:
            layout: theirs.
            end: the log's.
            seen: tokens of the conversation.

        Raises:
            SessionError: they do not add up.
        """
        ...

    def fill(self, block: Block, into: Bytes) -> None:
        """Write the rows of one of them.

        Raises:
            SessionError: they are not what was saved.
        """
        ...


class _HeldLog:
    """In memory."""

    def __init__(self, held: Logged) -> None:
        self._held = held

    def blocks(self, layout: LogLayout, end: int, seen: int) -> Sequence[Block]:
        return self._held.blocks

    def fill(self, block: Block, into: Bytes) -> None:
        into[:] = block.rows


class _StoredLog:
    """In a session file.

    Attributes:
        stored: the blocks, once they were asked for.
    """

    def __init__(self, session: session_file.Session) -> None:
        self._session = session
        self.stored: list[StoredBlock] = []
        self._of: dict[int, StoredBlock] = {}

    def blocks(self, layout: LogLayout, end: int, seen: int) -> Sequence[Block]:
        self.stored = self._session.blocks(layout, end, seen)
        self._of = {id(one.block): one for one in self.stored}
        return [one.block for one in self.stored]

    def fill(self, block: Block, into: Bytes) -> None:
        try:
            self._of[id(block)].fill(into)
        except ValueError as error:
            raise self._session.damaged(error) from error


def resume(
    llm: Llama, name: str, header: dict[str, Any], arrays: dict[str, Array], saved: SavedLog
) -> None:
    """Take over what ``conversation`` gave, here or in another process.

    Args:
        name: what it is called in a sentence.
        saved: the KV log, if the header tells of one.

    Raises:
        SessionError, KVCacheError: see Llama.load_session.
    """
    kv = _without_queries(llm, "load_session")
    session_file.require_conversation(name, header, arrays)
    session_file.require_same(name, header["made_with"], settings(llm))
    tokens, state = arrays.pop("tokens"), arrays.pop("state")
    _require_tokens(llm, name, tokens)
    try:
        table = Table.of(header["table"], arrays)
    except ValueError as error:
        raise SessionError(f"{name} is inconsistent: {error}") from error
    if table.seen == len(tokens) == 0:
        llm.reset()
        return
    if table.seen != len(tokens) or not table.adds_up(kv.empty_table()):
        raise SessionError(f"{name} is inconsistent: its table of kept tokens is invalid")
    if table.kept > kv.limits.cells:
        raise SessionError(f"{name} is inconsistent: it has more rows than cells")
    protected = _protectable(kv, name, header["protected_prefix"])
    try:
        held = _copied_log(kv, name, header["log"], table, saved, protected)
        with kv.restoring(table, state):
            llm.take_over(tokens)
            kv.restore_counts(
                *(header["evictions"], header["evictions_as_state"], header["eviction_ms"]),
                *(header["recalls"], header["recalled"], header["recall_ms"]),
            )
            kv.protect_prefix(protected)
            if kv.query_log is not None:
                kv.query_log.clear()  # what it has is of another conversation
            if kv.log is not None:
                kv.log.restore(held)
    except ValueError as error:
        _give_up_copies(kv)
        if isinstance(error, SessionError):
            raise
        raise SessionError(f"{name} does not fit: {error}") from error
    except KVCacheError:
        llm.reset()
        raise


def _copied_log(
    kv: EvictionManager,
    name: str,
    log: dict[str, Any] | None,
    table: Table,
    saved: SavedLog,
    protected: int,
) -> Logged:
    """A saved KV log in the store of the one here, held by nobody yet. Without any, tokens before
    the table's tail are lost (EvictionManager.restore).

    Args:
        log: what the header says of it.

    Raises:
        SessionError: it is of another layout, or does not add up.
    """
    if kv.log is None or log is None:
        return Logged()
    end = session_file.require_log(name, log, layout_numbers(kv.log.layout), table)
    blocks = saved.blocks(kv.log.layout, end, table.seen)
    if any(block.scores.shape[3:] != table.scores.shape[3:] for block in blocks):
        raise SessionError(f"{name} is inconsistent: its KV log has scores of another policy")
    return kv.log.copied(blocks, saved.fill, end, pinned=protected)


def _give_up_copies(kv: EvictionManager) -> None:
    if kv.log is not None:
        kv.log.restore(kv.log.held)


def _read_again(llm: Llama, name: str, header: dict[str, Any], arrays: dict[str, Array]) -> None:
    """``load`` of what a ``Rescue`` wrote."""
    kv = require_bounded(llm, "load_session")
    session_file.require_rescued(name, header, arrays)
    session_file.require_same(name, header, {"model": llm.model_identity})
    tokens = arrays["tokens"]
    _require_tokens(llm, name, tokens)
    asked = header["protected_prefix"] if llm.options.protect_system else 0
    protected = _protectable(kv, name, asked)
    llm.reset()
    kv.protect_prefix(protected)
    llm.eval(tokens.tolist())


class Rescue:
    """Writes a conversation down just before ggml ends the process, or when it is asked to.

    Args:
        llm: whose conversation; it is not kept alive.
        where: see Llama.rescue_to.
        extra: likewise.

    Raises:
        SessionError: the cache is not bounded.
    """

    def __init__(
        self, llm: Llama, where: Callable[[], str], extra: Callable[[], Any] | None
    ) -> None:
        require_bounded(llm, "rescue_to")
        self._llm = weakref.ref(llm)
        self._model = llm.model_identity  # now, while the file can surely be read
        self._where, self._extra = where, extra
        self.stop = before_abort(self.write)

    def write(self, reason: str) -> None:
        """It must not call llama.cpp, which may have failed.

        Raises:
            SessionError: the file cannot be written.
        """
        llm = self._llm()
        if llm is None or llm.kv is None:
            return
        header: dict[str, Any] = {
            "rescue": reason,
            "model": self._model,
            "protected_prefix": llm.kv.protected_prefix,
            "extra": None,
        }
        tokens = llm.input_ids[: llm.n_tokens].astype(np.int32)
        try:
            if self._extra is not None:
                # what is no JSON fails here, and not when all is written
                header["extra"] = json.loads(json.dumps(self._extra(), allow_nan=False))
        finally:  # the tokens shall not be lost with what the caller adds to them
            # the name was free when it was chosen; who has put a link there since means no good
            session_file.write(self._where(), header, {"tokens": tokens}, follow_link=False)


def settings(llm: Llama) -> dict[str, Any]:
    """Everything that decides what the cache's numbers mean and how they go on."""
    kv = _without_queries(llm, "a session")
    limits, shape, params = kv.limits, kv.cache.shape, llm.context_params
    lora = llm.lora_path
    return {
        "llama-cpp-python": BUILT_FOR,
        "model": llm.model_identity,
        "lora": [session_file.file_identity(lora), llm.lora_scale] if lora else None,
        "policy": kv.policy.identity(),
        "granularity": kv.granularity,
        **llm.options.asked_of_sessions(),
        "type_k": shape.type_k,  # before the cells, whose number follows from them
        "type_v": shape.type_v,
        "cells": limits.cells,
        "budget": limits.budget,
        "sinks": limits.sinks,
        "recent": limits.recent,
        "n_batch": limits.n_batch,
        "v_transposed": shape.v_transposed,
        "rotation": [shape.k_hadamard_block, shape.v_hadamard_block],
        "rope": [getattr(params, name) for name in _ROPE],
    }


def require_bounded(llm: Llama, name: str) -> EvictionManager:
    """Raises:
    SessionError: the cache is not bounded.
    """
    if llm.kv is None:
        raise SessionError(
            f"{name} is for a bounded cache: load the model with kv_budget, or use save_state"
        )
    return llm.kv


def _without_queries(llm: Llama, name: str) -> EvictionManager:
    kv = require_bounded(llm, name)
    if kv.policy.n_queries:
        raise SessionError(
            f"{name} is not possible with policy '{kv.policy.name}': its queries are not "
            "saved. Choose a policy that does not need queries"
        )
    return kv


def _require_tokens(llm: Llama, name: str, tokens: Array) -> None:
    if len(tokens) > llm.n_ctx():
        raise SessionError(
            f"{name} has {len(tokens)} tokens, too many for the logical context "
            f"n_ctx={llm.n_ctx()}: load the model with a larger n_ctx"
        )
    session_file.require_tokens(name, tokens, llm.n_vocab())


def _protectable(kv: EvictionManager, name: str, n_first: int) -> int:
    """How many first tokens a session's conversation protects here."""
    try:
        return kv.protectable(n_first)
    except BudgetError as error:
        raise SessionError(f"{name} does not fit: {error}") from error
