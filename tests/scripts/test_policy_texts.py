"""Texts for policies of models that others made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvp_edge.corpora import TRAINING_DIALOGUE_FILES, TRAINING_MEETING_FILES
from scripts.train_policy.texts import main


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder of one training book, one to measure on, chats of two collections, a meeting."""
    folder = tmp_path / "data"
    chat = [{"agent": f"agent_{i % 2}", "message": f"word{i} and more"} for i in range(6)]
    order = [{"speaker": ("user", "assistant")[i % 2], "text": f"coffee {i}"} for i in range(6)]
    turns = [{"speaker": "Ann", "content": f"point {i} of the agenda"} for i in range(400)]
    files = {
        "books/Kipling_Kim_1901.txt": "He sat in defiance of orders. " * 400,
        "books/Hardy_Madding_1874.txt": "FORBIDDEN " * 1000,
        TRAINING_DIALOGUE_FILES[0].replace("*", "freq"): json.dumps({"a": {"content": chat}}),
        TRAINING_DIALOGUE_FILES[1].replace("[0-5]", "3"): json.dumps([{"utterances": order}]),
        TRAINING_MEETING_FILES: json.dumps({"meeting_transcripts": turns}) + "\n",
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def written(data: Path, out: Path, *more: str) -> tuple[str, list[list[dict[str, str]]]]:
    main(["--data", str(data), "--out", str(out), "--count", "3", "--length", "200", *more])
    chats = (out / "chats.jsonl").read_text().splitlines()
    return (out / "texts.txt").read_text(), [json.loads(line) for line in chats]


def test_texts_and_three_kinds_of_chats_are_written(data: Path, tmp_path: Path) -> None:
    texts, chats = written(data, tmp_path / "out")
    assert len(texts.splitlines()) == 3
    assert all(len(line) == 200 * 6 for line in texts.splitlines())
    assert len(chats) == 9
    for chat in chats:
        assert [m["role"] for m in chat] == ["user", "assistant"] * (len(chat) // 2)
        assert sum(len(m["content"]) for m in chat) > 200 * 3
    kinds = ["".join(m["content"] for m in chat) for chat in chats[:3]]
    assert "word" in kinds[0] or "coffee" in kinds[0]
    assert "Ann: point" in kinds[1]
    assert "defiance" in kinds[2]
    assert "FORBIDDEN" not in texts + json.dumps(chats)


def test_the_seed_decides(data: Path, tmp_path: Path) -> None:
    first, again, other = (
        written(data, tmp_path / name, "--seed", seed)
        for name, seed in (("a", "1"), ("b", "1"), ("c", "2"))
    )
    assert first == again
    assert first != other


def test_a_folder_without_books_is_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["--data", str(tmp_path), "--out", str(tmp_path / "out")])
    assert "the data folder has no books/*.txt" in capsys.readouterr().err
