"""``kvp-edge eval``: what a bounded cache costs a model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from tqdm import tqdm

from kvp_edge.cache.options import EVALUATED
from kvp_edge.cli import options
from kvp_edge.cli.chat_format import AS_TRANSCRIPTS
from kvp_edge.cli.parameters import option
from kvp_edge.cli.shown import note, say
from kvp_edge.cli.subcommands import Command
from kvp_edge.cli.tables import named
from kvp_edge.evaluation import estimate, plots, records, report, run
from kvp_edge.evaluation.item import Task
from kvp_edge.evaluation.kept_tokens import write_html
from kvp_edge.evaluation.kept_tokens_image import write_png
from kvp_edge.evaluation.setting import CHOICES, Setting, budget_of
from kvp_edge.evaluation.tasks import GENERATION, RULER, TASKS, data_tasks
from kvp_edge.files import write_whole
from kvp_edge.llama import Llama
from kvp_edge.text.chat_prompt import transcribe_without_template

# how long to read for an estimate, in each way of reading, and at the start of every run
_ESTIMATE_SECONDS, _QUICK_SECONDS = 4.0, 1.0

# a run of so many seconds tells at its start how long it will take
_LONG = 300

_ESTIMATED = """\
A reply may end early; then writing takes less. Loading the model and scoring a context are not
counted, and a full cache becomes slower as it fills. MiB is the memory of the cache; one-shot mode
also keeps a copy of it. Nothing was run."""

_EPILOG = """\
Every policy reads the same conversations; replies are greedy. Each task is first run with the
full cache; a task that the model cannot do even then is shown, but left out of the averages. In the
report all comparisons are paired (of the same items), with 95 % bootstrap intervals.

  --mode bounded   the cache never holds more than the budget, while reading and
                   while writing, as in a chat. An eviction leaves three
                   quarters of the budget.
  --mode one-shot  the conversation is read into a full cache, and tokens are
                   dropped once: the papers' setting. With --question seen they
                   are dropped after the question.

policies besides those of kvp-edge policies:
  none             the full cache (always there)
  learned          the policy trained for this model, or give a policy file
  oracle           ranks by the attention that the rest of the conversation
                   really gives, which no policy can know
  golden           the same by the largest block of that attention
                   (ForesightKV's golden eviction)
  context-shift    llama.cpp's own rule: drop the oldest half

In --out: records.jsonl (every item with its reply), report.md, accuracy.png, loss-increase.png. The
same command resumes an interrupted run.

examples:
  kvp-edge eval
  kvp-edge eval model.gguf --mode one-shot --estimate  (only estimate the time)
  kvp-edge eval model.gguf --lengths 4096 --budgets 1/4,1/8 --items 50 \\
      --workers 2
  kvp-edge eval model.gguf --tasks ruler --mode one-shot \\
      --policies learned,snapkv,keydiff,oracle
  kvp-edge eval --tasks generation --policies learned,keydiff,oracle,golden
  kvp-edge eval --tasks books,dialogues --data DIR
  kvp-edge eval --list"""


_ASKED, _COMPARED, _RUN = "what is asked", "what is compared", "the run"


@dataclass(frozen=True, kw_only=True)
class Options(options.ModelOptions):
    tasks: str = option(
        "fact,facts,recall,pairs,niah_single_1,niah_single_2,niah_multikey_1,vt,books",
        panel=_ASKED,
        metavar="LIST",
        help="comma-separated names, ruler (those of its thirteen tasks that there is data for), "
        "generation (tasks in which the model writes a long text) or all",
    )
    list: bool = option(False, panel=_ASKED, help="list the tasks and exit")
    data: str | None = option(
        None, panel=_ASKED, metavar="DIR", help="folder with data for more tasks (see --list)"
    )
    items: int = option(
        20, panel=_ASKED, metavar="N", least=1, help="conversations per task and length"
    )
    lengths: str = option("1024", panel=_ASKED, metavar="LIST", help="tokens per conversation")
    seed: int = option(0, panel=_ASKED, metavar="N", help="random seed of the conversations")
    policies: str | None = option(
        None,
        panel=_COMPARED,
        metavar="LIST",
        shown="all but oracle and golden",
        help="names or policy files",
    )
    budgets: str = option(
        "1/4,1/8", panel=_COMPARED, metavar="LIST", help="tokens kept, or fractions of the length"
    )
    mode: str = option(
        "bounded", panel=_COMPARED, choices=("bounded", "one-shot"), help="see below"
    )
    question: str = option(
        "unseen",
        panel=_COMPARED,
        choices=("unseen", "seen"),
        help="whether the question is read before tokens are dropped",
    )
    granularity: str = options.llama_option(
        "granularity", _COMPARED, choices=CHOICES["granularity"]
    )
    keep_whole: str = options.llama_option("keep_whole", _COMPARED, choices=CHOICES["keep_whole"])
    isolate_turns: bool = options.llama_option("isolate_turns", _COMPARED)
    unprotected: bool = option(
        False,
        panel=_COMPARED,
        help="do not protect the first and the newest tokens, except the last one",
    )
    out: str | None = option(
        None, panel=_RUN, metavar="DIR", shown="kvp-eval-<MODEL>", help="folder for the results"
    )
    workers: int = option(
        1,
        panel=_RUN,
        metavar="N",
        least=1,
        help="processes; each loads the model and gets its share of the threads",
    )
    draw: int = option(
        0,
        panel=_RUN,
        metavar="N",
        help="for the first N conversations of every task, and every policy and budget, draw which "
        "tokens each head kept, as web pages and pictures in --out/kept",
    )
    estimate: bool = option(
        False,
        panel=_RUN,
        help="measure how fast the model reads and writes, estimate the time for what is still "
        "missing in --out, and exit",
    )


def _main(args: Options) -> int:
    tasks = {**TASKS, **(data_tasks(Path(args.data)) if args.data else {})}
    if args.list:
        for name, task in tasks.items():
            say(named(name, task.about, 18))
        return 0
    path = options.model_path(args)
    out = Path(args.out or f"kvp-eval-{Path(path).stem}")
    engine = options.engine_options(args)
    if args.workers > 1 and args.threads is None:
        engine["n_threads"] = engine["n_threads_batch"] = max(
            1, (os.cpu_count() or 2) // args.workers
        )
    the_run = run.Run(path, args.seed, args.type_k or "f16", args.type_v or "f16", engine)
    jobs = _jobs(args, the_run, tasks)
    file = out / "records.jsonl"
    known = {r.key(): r for r in records.read_records(file)} if file.exists() else {}
    wanted = dict.fromkeys(the_run.key(setting, p) for setting, todo in jobs for p in todo)
    left = [
        (setting, rest)
        for setting, todo in jobs
        if (rest := [p for p in todo if the_run.key(setting, p) not in known])
    ]
    n_left = sum(len(todo) for _, todo in left)
    drawn = _to_draw(jobs, args.draw)
    todo = estimate.parts(left, drawn)
    if args.estimate:
        say(_estimate(the_run, todo, args.workers))
        return 0
    out.mkdir(parents=True, exist_ok=True)
    note(
        f"reading {len(wanted)} conversations, {n_left} of them still to do, into '{out}'; after "
        "an interruption the same command resumes"
    )
    _note_if_long(the_run, todo, args.workers)
    done = len(wanted) - n_left
    with tqdm(total=len(wanted), initial=done, unit=" items", disable=None) as bar:
        for record in run.run_all(the_run, left, args.workers):
            records.append_record(file, record)
            known[record.key()] = record
            bar.set_description(f"{record.policy}, {record.task}")
            bar.update()
    found = [known[key] for key in wanted]
    _draw(the_run, drawn, out / "kept")
    text = report.report(found, title=f"{Path(path).stem}: what a bounded cache costs")
    write_whole(out / "report.md", text.encode())
    _plot(found, out)
    say(text)
    note(f"written: {out / 'report.md'}")
    return 0


def _estimate(the_run: run.Run, todo: Sequence[estimate.Part], workers: int) -> str:
    """How long it will take, way by way of reading and in all."""
    if not todo:
        return "Nothing is left to do: all records exist."
    speeds = estimate.measure_parts(the_run, todo, _ESTIMATE_SECONDS)
    lines = estimate.table(the_run, todo, speeds, workers)
    return "\n".join([*lines, "", *estimate.about_speeds(speeds), _ESTIMATED])


def _note_if_long(the_run: run.Run, todo: Sequence[estimate.Part], workers: int) -> None:
    """Measured in one way of reading alone, because it delays every run."""
    if not todo:
        return
    [speed] = estimate.measure_parts(the_run, todo[:1], _QUICK_SECONDS).values()
    seconds = sum((part.work for part in todo), estimate.Work()).at(speed) / workers
    if seconds >= _LONG:
        note(
            f"this will take up to {estimate.duration(seconds)} here "
            "(--estimate measures more carefully)"
        )


def _plot(found: Sequence[records.Record], out: Path) -> None:
    measures = {r.measure for r in found}
    for name, measure, plot in (
        ("accuracy.png", "accuracy", plots.accuracy_plot),
        ("loss-increase.png", "loss", plots.loss_increase_plot),
    ):
        try:
            if measure in measures:
                plot(found, out / name)
        except (ImportError, ValueError) as error:
            note(f"no plot: {error}")


def _to_draw(jobs: Sequence[run.Job], count: int) -> list[run.Job]:
    """The settings that drop tokens of each head, with the first ``count`` conversations of every
    task."""
    return [
        (setting, some)
        for setting, todo in jobs
        if setting.policy not in (records.FULL, records.SHIFT)
        and (some := [prompt for prompt in todo if prompt.number < count])
    ]


def _draw(the_run: run.Run, drawn: Sequence[run.Job], folder: Path) -> None:
    """A page and a picture for each of them."""
    if drawn:
        folder.mkdir(parents=True, exist_ok=True)
    for setting, prompt, shown in the_run.all_kept_tokens(drawn):
        policy = Path(setting.policy).stem
        name = f"{policy}-{setting.budget}-of-{setting.length}-{prompt.task}-{prompt.number}"
        write_html(shown, folder / f"{name}.html")
        try:
            write_png(shown, folder / f"{name}.png")
        except ImportError as error:
            note(f"no picture: {error}")
        note(f"drawn: {folder / name}.html")


def _jobs(args: Options, the_run: run.Run, tasks: dict[str, Task]) -> list[run.Job]:
    """Every setting with the conversations it reads, the full cache first."""
    names = _task_names(args.tasks, tasks)
    policies = _names(args.policies) if args.policies else run.known_policies(the_run.model)
    if not args.policies:
        policies = [p for p in policies if p not in (records.ORACLE, records.GOLDEN)]
    for policy in policies:
        run.check_policy(policy, the_run.model)
    lengths = [_length(text) for text in _names(args.lengths)]
    how: dict[str, Any] = {name: getattr(args, name) for name in ("mode", "question", *EVALUATED)}
    jobs: list[run.Job] = []
    with closing(Llama(the_run.model, n_ctx=256, repack=args.repack, verbose=False)) as llm:
        if transcribe_without_template(llm):
            note(AS_TRANSCRIPTS)
        for length in lengths:
            made = run.prompts(llm, tasks, names, length, args.items, args.seed, the_run.engine)
            groups = [made]
            if args.workers > 1:
                groups = [[p for p in made if p.task == name] for name in names]
            budgets = [budget_of(text, length) for text in _names(args.budgets)]
            options_: list[tuple[str, int | None]] = [(records.FULL, None)]
            options_ += [(p, b) for p, b in product(policies, budgets) if p != records.FULL]
            for policy, budget in options_:
                setting = Setting(
                    **how,
                    length=length,
                    longest=max(p.longest for p in made),
                    budget=budget,
                    policy=policy,
                    protected=not args.unprotected,
                )
                jobs += [(setting, todo) for todo in groups]
    return jobs


def _task_names(text: str, tasks: dict[str, Task]) -> list[str]:
    names: list[str] = []
    for name in _names(text):
        if name == "all":
            names += tasks
        elif name == "ruler":
            names += [n for n in tasks if n in RULER]
        elif name == "generation":
            names += GENERATION
        elif name in tasks:
            names.append(name)
        else:
            raise ValueError(
                f"unknown task '{name}'; choose from {', '.join(tasks)}, ruler, "
                "generation, all (more "
                "with --data, see kvp-edge eval --list)"
            )
    return list(dict.fromkeys(names))


def _length(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise ValueError(f"--lengths must be numbers of tokens, like 1024, not '{text}'")
    return int(text)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


COMMAND = Command(
    _main,
    Options,
    "Compare policies: ask a model the same questions with full and with bounded caches.",
    _EPILOG,
)
