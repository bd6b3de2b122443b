"""The store of chats: which are forgotten, what is deleted, where a request goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvp_edge.bundled import bundled_model
from kvp_edge.errors import SessionError
from kvp_edge.text.retokenize import n_equal
from support.packages import needs

needs("fastapi", "server")

from kvp_edge.server.chats import Chat, Chats, Message, bring, continues  # noqa: E402
from kvp_edge.server.context import Ask, Context  # noqa: E402
from kvp_edge.server.events import Began, Done, Event, Piece  # noqa: E402
from kvp_edge.server.served import Cancelled, ServedLlama  # noqa: E402

OPTIONS: dict[str, Any] = {
    "kv_budget": 128,
    "n_ctx": 1024,
    "verbose": False,
    "n_threads": 1,
    "n_threads_batch": 1,
}
LONG = "snow fell on all roofs where we sang " * 12


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def chat(nbytes: int = 0, *messages: Message, tokens: Any = ()) -> Chat:
    return Chat(nbytes=nbytes, messages=list(messages), tokens=np.array(tokens, np.int32))


def stored(limit: int, *chats: Chat) -> Chats:
    store = Chats(None, limit)
    for one in chats:
        store.put(one)
    return store


def ids(store: Chats) -> set[str]:
    return {one.id for one in store.all()}


# -- bytes ----------------------------------------------------------------------------------------


def test_chats_of_exactly_the_limit_all_stay() -> None:
    chats = [chat(100), chat(100), chat(56)]
    assert ids(stored(256, *chats)) == {one.id for one in chats}


def test_one_byte_past_the_limit_the_oldest_goes_and_no_other() -> None:
    first, second, third = chat(100), chat(100), chat(57)
    store = stored(256, first, second, third)
    assert ids(store) == {second.id, third.id}
    assert store.nbytes == 157
    assert first.deleted


def test_going_on_with_a_chat_makes_it_the_newest() -> None:
    first, second, third = chat(100), chat(100), chat(100)
    store = stored(250, first, second)
    store.put(first)
    store.put(third)
    assert ids(store) == {first.id, third.id}


def test_as_many_go_as_must() -> None:
    chats = [chat(10) for _ in range(10)]
    large = chat(75)
    store = stored(100, *chats, large)
    assert ids(store) == {large.id, chats[8].id, chats[9].id}


def test_a_chat_larger_than_the_limit_stays_alone_until_another_comes() -> None:
    small, large, next_one = chat(10), chat(1000), chat(10)
    store = stored(100, small, large)
    assert ids(store) == {large.id}
    store.put(next_one)
    assert ids(store) == {next_one.id}


def test_a_busy_chat_is_not_forgotten() -> None:
    busy, idle, new = chat(100), chat(100), chat(100)
    store = stored(200, busy, idle)
    busy.busy = True
    store.put(new)
    assert ids(store) == {busy.id, new.id}


def test_an_empty_store_has_nothing() -> None:
    store = Chats(None, 0)
    assert (len(store), store.nbytes, store.all(), store.get("0" * 16)) == (0, 0, [], None)
    assert not store.delete("0" * 16)


# -- which chat -----------------------------------------------------------------------------------


def test_a_request_goes_on_with_the_chat_that_has_most_of_its_messages() -> None:
    said = [user("a"), assistant("b"), user("c"), assistant("d")]
    short, long = chat(0, *said[:2], tokens=[1, 2]), chat(0, *said, tokens=[1, 2, 3, 4])
    store = stored(0, long, short)
    place = store.find([*said, user("e")], np.array([1, 2, 3, 4, 5], np.int32), None)
    assert place.chat is place.source is long
    assert long.busy


def test_who_asks_for_a_busy_chat_gets_a_chat_of_their_own() -> None:
    said = [user("a"), assistant("b")]
    one = chat(0, *said, tokens=range(100))
    store = stored(0, one)
    asked = [*said, user("c")], np.arange(101, dtype=np.int32)
    assert store.find(*asked, one.id).chat is one
    second = store.find(*asked, one.id)
    assert second.chat is not one
    assert second.chat.parent == one.id
    assert second.source is one  # the resident one
    store.release(one)
    assert store.find(*asked, one.id).chat is one


def test_another_text_of_an_earlier_message_is_another_chat() -> None:
    one = chat(0, user("a"), assistant("b"), user("c"), assistant("d"), tokens=[1, 2])
    store = stored(0, one)
    place = store.find([user("a"), assistant("b"), user("C")], np.array([1], np.int32), None)
    assert place.chat is not one
    assert place.chat.parent == one.id
    assert one.messages[2] == user("c")


@pytest.mark.parametrize(("n", "worth"), [(63, False), (64, True)])
def test_so_many_equal_tokens_are_worth_branching(n: int, worth: bool) -> None:
    one = chat(0, user("a"), assistant("b"), tokens=range(200))
    store = stored(0, one)
    tokens = np.r_[np.arange(n), 999].astype(np.int32)
    assert (store.find([user("z")], tokens, one.id).source is one) is worth


def test_spaces_at_the_ends_are_the_same_text_and_another_role_is_not() -> None:
    assert continues([user(" a "), assistant("b\n"), user("c")], [user("a"), assistant("b")])
    assert not continues([user("a"), user("b")], [user("a"), assistant("b")])
    assert not continues([user("a")], [user("a"), assistant("b")])
    assert continues([user("a")], [])


@pytest.mark.parametrize(
    ("one", "other", "n"), [([], [], 0), ([1], [], 0), ([1, 2], [1, 2, 3], 2), ([1, 2], [1, 3], 1)]
)
def test_n_equal(one: list[int], other: list[int], n: int) -> None:
    assert n_equal(np.array(one, np.int32), np.array(other, np.int32)) == n


# -- with a model ---------------------------------------------------------------------------------


class Told(ServedLlama):
    """Calls ``meanwhile`` while a chat is being saved, when the file is already there."""

    meanwhile: Callable[[], None] = staticmethod(lambda: None)

    def save_session(self, *args: Any, **kwargs: Any) -> None:
        super().save_session(*args, **kwargs)
        self.meanwhile()

    def save_state(self) -> Any:
        state = super().save_state()
        self.meanwhile()
        return state


Asked = Callable[..., tuple[str, str, int]]


class Served:
    """A context, asked without a server."""

    def __init__(self, store: Chats, llm: Told | None = None) -> None:
        self.llm = llm or Told(bundled_model(), **OPTIONS)
        self.store = store
        self.context = Context(self.llm, store, keeps_at_once=store.folder is not None)

    def __call__(
        self, *messages: Message, stops_after: int | None = None, **how: Any
    ) -> tuple[str, str, int]:
        """
        Args:
            stops_after: pieces, after which the client has gone.

        Returns:
            The chat's id, what was said, and how many tokens of the prompt were not read.
        """
        told: list[Event] = []

        def gone() -> bool:
            n = sum(isinstance(event, Piece) for event in told)
            return stops_after is not None and n >= stops_after

        ask = Ask(list(messages), how={"max_tokens": 6, "temperature": 0.0, **how})
        try:
            self.context.serve(ask, gone, told.append)
        except Cancelled:
            assert stops_after is not None
        else:
            assert isinstance(told[-1], Done)
        began = next((event for event in told if isinstance(event, Began)), None)
        if began is None:
            return "", "", 0
        text = "".join(d["content"] for e in told if isinstance(e, Piece) for d in e.deltas)
        return began.chat_id, text, began.n_cached


@pytest.fixture(params=["in memory", "in a folder"])
def served(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Served]:
    store = Chats(tmp_path if request.param == "in a folder" else None, 2**30)
    served = Served(store)
    yield served
    served.context.close()
    store.close()


def test_a_chat_that_was_left_by_a_branch_goes_on_without_reading(served: Served) -> None:
    said = [user(LONG)]
    first, text, _ = served(*said)
    said.append(assistant(text))
    n = len(served.store.get(first).tokens)  # type: ignore[union-attr]
    again, _, _ = served(user(LONG), max_tokens=3)
    assert again != first
    back, _, cached = served(*said, user("And then?"))
    assert back == first
    assert cached >= n - 2


def test_a_chat_deleted_while_it_is_kept_stays_deleted(served: Served) -> None:
    first, _, _ = served(user(LONG))

    def delete() -> None:
        served.store.delete(first)

    served.llm.meanwhile = delete  # type: ignore[method-assign]
    chat = served.store.get(first)
    assert chat is not None
    served(*chat.messages, user("And then?"))
    served(user("Something else."))  # so that it has to leave the cells
    assert served.store.get(first) is None
    assert chat.kept is None
    assert chat.nbytes == 0
    if served.store.folder is not None:
        assert first not in {path.stem for path in served.store.folder.glob("*.kvp")}


def test_a_chat_deleted_while_it_is_written_is_not_kept(served: Served) -> None:
    first, text, _ = served(user(LONG))
    chat = served.store.get(first)
    assert chat is not None
    served.store.delete(first)
    second, _, _ = served(user(LONG), assistant(text), user("And then?"))
    assert second != first
    served(user("Something else."))
    assert chat.kept is None
    assert ids(served.store).isdisjoint({first})


def test_a_stream_that_is_dropped_leaves_what_was_said(served: Served) -> None:
    _, whole, _ = served(user(LONG), max_tokens=12)
    name, said, _ = served(user(LONG + "Really."), max_tokens=12, stops_after=2)
    chat = served.store.get(name)
    assert chat is not None
    assert not chat.busy
    assert [m["role"] for m in chat.messages] == ["user", "assistant"]
    assert chat.messages[1]["content"] == said
    back, _, cached = served(*chat.messages, user("Go on."))
    assert back == name
    assert cached > 64
    assert whole


def test_a_request_cancelled_before_it_is_read_changes_no_chat(served: Served) -> None:
    first, text, _ = served(user(LONG))
    chat = served.store.get(first)
    assert chat is not None
    served(user("Other."))  # the cells are another's
    served(user(LONG), assistant(text), user(LONG), stops_after=0)
    back, _, cached = served(user(LONG), assistant(text), user("And then?"))
    assert served.store.get(back) is not None
    assert cached > 64
    assert not any(one.busy for one in served.store.all())


# -- in a folder ----------------------------------------------------------------------------------


def test_two_servers_cannot_share_a_folder(tmp_path: Path) -> None:
    store = Chats(tmp_path, 2**30)
    with pytest.raises(SessionError, match="another server keeps its chats"):
        Chats(tmp_path, 2**30)
    store.close()
    Chats(tmp_path, 2**30).close()


def test_a_chat_of_other_settings_can_be_deleted_with_its_file(tmp_path: Path) -> None:
    store = Chats(tmp_path, 2**30)
    served = Served(store)
    name, _, _ = served(user(LONG))
    served.context.close()
    store.close()

    store = Chats(tmp_path, 2**30)
    other = Told(bundled_model(), **{**OPTIONS, "kv_budget": 96})
    assert store.read_folder(other) == []
    assert store.get(name) is not None
    assert store.delete(name)
    other.close()
    store.close()
    assert list(tmp_path.glob("*.kvp")) == []


def test_what_is_no_chat_in_the_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.kvp").write_bytes(b"no session")
    (tmp_path / f"{'0' * 16}.kvp").write_bytes(b"")
    store = Chats(tmp_path, 2**30)
    llm = Told(bundled_model(), **OPTIONS)
    problems = store.read_folder(llm)
    llm.close()
    store.close()
    assert len(problems) == 2
    assert sorted(path.name for path in tmp_path.glob("*.kvp")) == [
        f"{'0' * 16}.kvp",
        "notes.kvp",
    ]


def test_a_chat_that_cannot_be_kept_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Chats(tmp_path, 2**30)
    served = Served(store)
    first, text, _ = served(user(LONG))

    def full() -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(served.llm, "meanwhile", full)
    with pytest.warns(UserWarning, match="a chat cannot be kept.*No space.*last turn is lost"):
        served(user(LONG), assistant(text), user("And then?"))
    chat = store.get(first)
    assert chat is not None
    assert chat.kept is None
    with pytest.warns(UserWarning, match="cannot be kept"):
        served(user("Something else."))
    monkeypatch.undo()
    with pytest.warns(UserWarning, match="a chat is read again"):
        back, _, cached = served(*chat.messages, user("Go on."))
    assert (back, cached) == (first, 0)
    assert chat.kept is not None
    served.context.close()
    store.close()


# -- two contexts ---------------------------------------------------------------------------------


def test_a_chat_that_went_on_in_another_context_is_brought_from_there(tmp_path: Path) -> None:
    store = Chats(tmp_path, 2**30)
    one, other = Served(store), Served(store)
    first, text, _ = one(user(LONG))
    said = [user(LONG), assistant(text), user(LONG)]
    assert other(*said)[0] == first
    chat = store.get(first)
    assert chat is not None
    n = len(chat.tokens)
    back, _, cached = one(*chat.messages, user("And then?"))
    assert back == first
    assert cached >= n - 2
    for served in (one, other):
        served.context.close()
    store.close()


def test_a_chat_is_not_read_while_another_context_writes_it(tmp_path: Path) -> None:
    store = Chats(tmp_path, 2**30)
    one, other = Served(store), Served(store)
    first, text, _ = one(user(LONG))
    chat = store.get(first)
    assert chat is not None
    read = threading.Event()

    def branch() -> None:
        bring(other.llm, chat)
        read.set()

    reader = threading.Thread(target=branch)

    def meanwhile() -> None:
        reader.start()
        assert not read.wait(0.3)

    one.llm.meanwhile = meanwhile  # type: ignore[method-assign]
    one(user(LONG), assistant(text), user("And then?"))
    reader.join()
    assert read.is_set()
    assert np.array_equal(other.llm.input_ids[: other.llm.n_tokens], chat.tokens)
    one.llm.meanwhile = lambda: None  # type: ignore[method-assign]
    for served in (one, other):
        served.context.close()
    store.close()


def test_a_chat_is_busy_until_it_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else another context goes on with it meanwhile, and both write its file."""
    store = Chats(tmp_path, 2**30)
    served = Served(store)
    first, text, _ = served(user(LONG))
    chat = store.get(first)
    assert chat is not None
    seen: list[bool] = []
    monkeypatch.setattr(served.llm, "meanwhile", lambda: seen.append(chat.busy))
    served(user(LONG), assistant(text), user("And then?"))
    assert seen == [True]
    assert not chat.busy
    served.context.close()
    store.close()
