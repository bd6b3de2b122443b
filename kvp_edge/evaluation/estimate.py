"""Estimates how long an evaluation or a demo will take on this machine.

Tokens to read are counted exactly. Replies may end early, so tokens to write are an upper bound.
The speed is measured on the start of one conversation, just before.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass

from gguf import GGMLQuantizationType

from kvp_edge.binding.model import read_model_shape
from kvp_edge.cache.limits import CELL_UNIT
from kvp_edge.evaluation.readers import shares_reading, shares_trace, subject_of
from kvp_edge.evaluation.records import SHIFT
from kvp_edge.evaluation.run import Job, Run, groups
from kvp_edge.evaluation.setting import Prompt, Setting
from kvp_edge.measuring import MeasuringLlama

# Numbers of tokens: read before the clock starts, so that all of the model is in memory; in the
# first batch; read one by one, as a reply is written.
_WARM, _FIRST, _SINGLE = 16, 64, 16
_MOST_AT_ONCE = 512


@dataclass(frozen=True)
class Work:
    """Tokens to read, in batches, and tokens to write at most, one by one."""

    read: int = 0
    written: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.read + other.read, self.written + other.written)

    def at(self, speed: Speed) -> float:
        """Seconds."""
        return self.read / speed.reading + self.written / speed.writing


@dataclass(frozen=True)
class Speed:
    """Tokens per second, here and now.

    Attributes:
        reading, writing: in batches, and one by one.
        over: the first tokens of a conversation, over which it was measured.
    """

    reading: float
    writing: float
    over: int


def measure(read: Callable[[Sequence[int]], None], tokens: Sequence[int], seconds: float) -> Speed:
    """Read the start of a conversation, in about ``seconds``, but at least a little of it.

    Args:
        read: reads tokens after those that it has read before.
        tokens: of the conversation, at least 3.
    """
    end = len(tokens) - min(_SINGLE, len(tokens) // 3)  # up to there in batches
    at = min(_WARM, end - 1)
    read(tokens[:at])
    reading = last = 0.0
    start, size = at, _FIRST
    while at < end and reading + 2 * last <= seconds:  # the next batch is twice as large
        batch = tokens[at : min(at + size, end)]
        last = _timed(read, [batch])
        reading += last
        at += len(batch)
        size = min(2 * size, _MOST_AT_ONCE)
    single = [[token] for token in tokens[at : at + _SINGLE]]
    return Speed((at - start) / reading, len(single) / _timed(read, single), at + len(single))


def _timed(read: Callable[[Sequence[int]], None], batches: Sequence[Sequence[int]]) -> float:
    """Seconds, more than none."""
    started = time.perf_counter()
    for batch in batches:
        read(batch)
    return max(time.perf_counter() - started, 1e-6)


def duration(seconds: float) -> str:
    """In words, as roughly as an estimate is: "40 seconds", "12 minutes", "3.5 hours"."""
    if seconds < 60:
        n = max(1, math.ceil(seconds / 5) * 5 if seconds > 5 else math.ceil(seconds))
        return f"{n} second{'s' * (n != 1)}"
    if seconds < 90 * 60:
        n = round(seconds / 60)
        return f"{n} minute{'s' * (n != 1)}"
    return f"{seconds / 3600:.1f} hours"


# -- an evaluation -------------------------------------------------------------------------------


@dataclass
class Part:
    """Work of one kind: conversations that settings share, or those of one setting.

    Attributes:
        name: what it is, for the user.
        setting: one of its settings, in which the speed is measured.
        prompt: one of its conversations, whose start is read for the measurement.
        cells: tokens in the cache at most.
        conversations: how many times one is read from its start.
    """

    name: str
    setting: Setting
    prompt: Prompt
    cells: int
    conversations: int = 0
    work: Work = Work()

    def add(self, work: Work) -> None:
        self.conversations += 1
        self.work += work


def parts(jobs: Sequence[Job], drawn: Sequence[Job] = ()) -> list[Part]:
    """All that a run will read and write.

    Args:
        jobs: the work; see ``Run``.
        drawn: whose kept tokens are to be drawn.
    """
    found: dict[tuple[str, int], Part] = {}

    def part(name: str, setting: Setting, prompt: Prompt, cells: int) -> Part:
        made = Part(name, setting, prompt, cells)
        return found.setdefault((name, setting.length), made)

    for all_jobs, asked, suffix in ((jobs, True, ""), (drawn, False, ", to draw")):
        for group in groups(all_jobs):
            for prompt, settings in _by_conversation(group):
                # those of a conversation are all of one kind: see ``groups``
                shared = shares_reading(settings[0])
                for setting in settings[:1] if shared else settings:
                    name, cells = _name_and_cells(setting)
                    reading = part(f"{name}{suffix}", setting, prompt, cells)
                    reading.add(Work(setting.cut(prompt)))
                    for one in settings if shared else [setting]:
                        if asked:
                            reading.work += _ending(one, prompt)
                if any(map(shares_trace, settings)):
                    name, cells = f"traces for the oracles{suffix}", settings[0].longest
                    part(name, settings[0], prompt, cells).add(_trace(prompt))
    return list(found.values())


def _by_conversation(group: Sequence[Job]) -> Iterator[tuple[Prompt, list[Setting]]]:
    settings: dict[int, tuple[Prompt, list[Setting]]] = {}
    for setting, todo in group:
        for prompt in todo:
            settings.setdefault(id(prompt), (prompt, []))[1].append(setting)
    yield from settings.values()


def _name_and_cells(setting: Setting) -> tuple[str, int]:
    if shares_reading(setting):
        return "read once for all settings", setting.longest
    if setting.budget is None:
        return "full cache", setting.longest
    # context shift uses no more cells of its cache than the others have
    cells = setting.longest if setting.policy == SHIFT else min(setting.budget, setting.longest)
    return f"{setting.policy}, {setting.budget} tokens", cells


def _ending(setting: Setting, prompt: Prompt) -> Work:
    """The tokens read and written after tokens were dropped."""
    turns = sum(map(len, prompt.turns))
    replies = 0 if prompt.item is None else 1 + len(prompt.turns)
    return Work(len(prompt.tokens) - setting.cut(prompt) + turns, replies * prompt.reply_tokens)


def _trace(prompt: Prompt) -> Work:
    """The conversation with its last reply, for the oracles; where there are several questions, the
    replies before it are written first."""
    turns = sum(map(len, prompt.turns))
    asked = len(prompt.tokens) + turns
    if prompt.item is None:
        return Work(asked)
    reply = prompt.reply_tokens
    if not prompt.turns:
        return Work(asked, reply)
    replies = len(prompt.turns) * reply
    return Work(asked, replies + reply) + Work(asked + replies, reply)


def measure_parts(run: Run, todo: Sequence[Part], seconds: float) -> dict[int | None, Speed]:
    """The speed with every budget among the parts, with the full cache under None.

    Args:
        seconds: about how long to read with each.
    """
    found: dict[int | None, Speed] = {}
    for part in todo:
        if (way := _way(part)) not in found:
            with closing(_subject(run, part)) as subject:
                found[way] = measure(subject.read, part.prompt.tokens.tolist(), seconds)
    return found


def _subject(run: Run, part: Part) -> MeasuringLlama:
    if _way(part) is None:
        return MeasuringLlama.whole(run.model, part.setting.longest, **run.engine)
    return subject_of(run.model, part.setting, run.engine)


def _way(part: Part) -> int | None:
    """The budget, if the cache never keeps more; None: it keeps all tokens for a while."""
    return None if part.cells == part.setting.longest else part.setting.budget


def about_speeds(speeds: Mapping[int | None, Speed]) -> list[str]:
    """The measured speeds, one per line."""
    return [
        f"{'full cache' if way is None else f'{way} tokens held'}: reads {speed.reading:,.0f} and "
        f"writes {speed.writing:,.1f} tokens a second, over {speed.over:,} tokens"
        for way, speed in speeds.items()
    ]


def cache_bytes(run: Run, part: Part) -> int:
    """Bytes of keys and values in llama.cpp's cells; with sliding windows, at most."""
    f16 = int(GGMLQuantizationType.F16)
    types = [f16 if (kind := run.engine.get(t)) is None else kind for t in ("type_k", "type_v")]
    per_cell = read_model_shape(run.model).bytes_per_cell(*types)
    return -(-part.cells // CELL_UNIT) * CELL_UNIT * per_cell


def table(run: Run, todo: Sequence[Part], speeds: Mapping[int | None, Speed], n: int) -> list[str]:
    """The most time that every part takes, and the total, as lines.

    Args:
        n: processes, assumed not to slow each other down.
    """
    names = [f"{part.name}, length {part.setting.length:,}" for part in todo]
    wide = max(map(len, [*names, "total"]))
    head = f"{'':{wide}}{'readings':>10}{'to read':>13}{'to write':>11}{'MiB':>9}  time"
    lines = [head, "-" * (len(head) + 8)]
    rows = [
        (
            name,
            part.conversations,
            part.work,
            cache_bytes(run, part),
            part.work.at(speeds[_way(part)]) / n,
        )
        for name, part in zip(names, todo, strict=True)
    ]
    rows.append(
        (
            "total",
            sum(row[1] for row in rows),
            sum((row[2] for row in rows), Work()),
            max(row[3] for row in rows),
            sum(row[4] for row in rows),
        )
    )
    for name, readings, work, n_bytes, seconds in rows:
        lines.append(
            f"{name:{wide}}{readings:>10,}{work.read:>13,}{work.written:>11,}"
            f"{n_bytes / 2**20:>9.1f}  {duration(seconds)}"
        )
    return lines
