"""``kvp-edge plan``: what fits into so much memory, and the command that uses it."""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import MISSING, dataclass, fields
from typing import Any

from kvp_edge.cache.limits import memory_bytes
from kvp_edge.cache.options import OPTIONS, CacheOptions
from kvp_edge.cache.type_table import shipped_table
from kvp_edge.cache.types import KVTypes
from kvp_edge.cli import options
from kvp_edge.cli.parameters import names_of, option
from kvp_edge.cli.shown import say
from kvp_edge.cli.subcommands import Command
from kvp_edge.cli.tables import table
from kvp_edge.errors import BudgetError
from kvp_edge.planning import Fit, Missing, Planner

_EPILOG = """\
A conversation takes memory for the model's weights; for the cells, which hold the keys and values
of the tokens that are kept; for what llama.cpp computes in; and for the log of what was dropped,
which recall needs and which grows with the conversation, up to --kv-log-limit. llama.cpp is asked
for all sizes. Memory of a GPU counts like any other. Python, the program and the policy come on
top.

For every type of keys and values the table shows the most cells that fit. Smaller types hold more
tokens, each less precisely.

in the table:
  kept  tokens in the cells when --length tokens are read
  log   memory of the log by then; none if nothing is dropped, if --kv-log names
        a file, or with --recall off
  all   the sum, with the weights
  reads how fast a long text is read from a full cache, next to an f16 one of as
        many bytes, both on the CPU: the mean of what was measured
  loss  how much more the model errs than with a full f16 cache, in nats per
        token, with recall and with it off: the mean of what was measured at
        the nearest share of a full cache

(auto) is what kvp-edge chooses by itself for this memory; (asked) are types that you name. The last
line is the command for it.

examples:
  kvp-edge plan model.gguf --memory 4GiB
  kvp-edge plan model.gguf --memory 4GiB --length 100000
  kvp-edge plan model.gguf --memory 2GiB --length 100000 --kv-log chat.kvlog
  kvp-edge plan model.gguf --memory 8GiB --gpu-layers -1 --flash-attn"""

_FITS = "what is to fit"


@dataclass(frozen=True, kw_only=True)
class _Asked:
    memory: str = option(..., panel=_FITS, metavar="SIZE", help="memory for all of it, like 4GiB")
    length: int | None = option(
        None,
        panel=_FITS,
        metavar="N",
        least=1,
        shown="--n-ctx",
        help="tokens that a conversation will have",
    )


@dataclass(frozen=True, kw_only=True)
class Options(options.CacheWays, options.ModelOptions, _Asked):
    n_ctx: int | None = options.n_ctx_option(
        "the length that the model was trained for, or --length if that is more"
    )


def _main(args: Options) -> int:
    memory = memory_bytes("--memory", args.memory)
    path = options.model_path(args)
    trained = options.trained_context(path)
    n_ctx = args.n_ctx or max(trained, args.length or 0)
    length = args.length or n_ctx
    if length > n_ctx:
        raise BudgetError(f"--length {length} is more than --n-ctx {n_ctx}, the most there can be")
    options.warn_beyond_training(length, path, args)
    ways = {one.name: getattr(args, one.name) for one in fields(options.CacheWays)}
    engine = options.engine_options(args)
    asked = CacheOptions(**{**ways, "n_ctx": n_ctx, "repack": args.repack, "kv_budget": 1})
    with closing(Planner(path, asked, engine, length=length, memory=memory)) as planner:
        found = [planner.fit(types) for types in planner.types()]
        fits = [one for one in found if isinstance(one, Fit)]
        chosen = planner.chosen(fits)
        say(_told_weights(path, planner))
        for line in _lines(planner, found, chosen, args):
            say(line)
    lacks_named = chosen is None and planner.named is not None
    if lacks_named:
        found = [one for one in found if one.types == planner.named]
    if not fits or lacks_named:
        raise BudgetError(_missing(found, planner))
    if chosen is None:  # what is chosen by itself does not fit
        whole = [fit for fit in fits if length <= fit.limits.cells]
        chosen = [*whole, *fits][0]
        forced = {"kv_type": str(chosen.types)}
    else:
        forced = {}
    for line in _about(chosen, length, args, bool(forced)):
        say(line)
    n_ctx_asked = {} if n_ctx == trained else {"n_ctx": n_ctx}
    say(_command(args, {"kv_budget": chosen.budget, **forced, **n_ctx_asked}))
    return 0


def _told_weights(path: str, planner: Planner) -> str:
    weights = _size(planner.weights)
    source = "llama.cpp reports" if planner.loaded else "the file has"
    left = planner.memory - planner.weights
    rest = f"{_size(left)} are left" if left > 0 else f"{_size(-left)} are missing for them alone"
    return f"{os.path.basename(path)}: {source} {weights} of weights; {rest}."


def _lines(
    planner: Planner, found: Sequence[Fit | Missing], chosen: Fit | None, args: Options
) -> Iterator[str]:
    head = [
        *(("types", 11), ("cells", 8), ("kept", 8), (f"of {planner.length}", 9)),
        *(("MiB: cells", 12), ("compute", 9), ("log", 9), ("all", 9)),
        *(("reads", 7), ("loss: recall", 14), ("off", 14)),
    ]
    yield from table(head, [_row(one, planner, one is chosen, args) for one in found])
    for one in found:
        if isinstance(one, Missing) and one.why:
            yield f"{one.types} is not possible: {one.why}"


def _row(one: Fit | Missing, planner: Planner, chosen: bool, args: Options) -> list[str]:
    if isinstance(one, Missing):
        needs = f"needs {_mib(one.needs)}" if one.needs else "-"
        return [str(one.types), *["-"] * 6, needs, "-", "-", "-"]
    kept, f = one.kept(planner.length), one.footprint
    share = one.share(planner.full)
    return [
        f"{one.types}{_mark(planner) if chosen else ''}",
        str(one.limits.cells),
        str(kept),
        f"{100 * kept / planner.length:.0f} %",
        _mib(f.cells),
        _mib(f.compute),
        _mib(one.log) if one.log else "-",
        _mib(one.total),
        _reads(one.types, args),
        _loss(str(one.types), share, recall=True),
        _loss(str(one.types), share, recall=False),
    ]


def _mark(planner: Planner) -> str:
    return " (auto)" if planner.named is None else " (asked)"


def _reads(types: KVTypes, args: Options) -> str:
    """Measured without flash attention where values do not need it."""
    other = args.gpu_layers or (args.flash_attn and not types.quantised_values)
    speed = None if other else shipped_table().speed(str(types))
    return "-" if speed is None else f"x {speed[0]:.2f}"


def _loss(types: str, share: float, *, recall: bool) -> str:
    if share >= 1 and types == "f16":
        return "none"
    rows = shipped_table().nearest(types, min(share, 1.0), recall=recall)
    if not rows:
        return "not measured"
    return f"{math.fsum(row.loss_increase for row in rows) / len(rows):+.3f}"


def _about(fit: Fit, length: int, args: Options, forced: bool) -> Iterator[str]:
    if forced:
        yield (
            f"What kvp-edge chooses by itself does not fit, so this is {fit.types}. --kv-log FILE "
            "makes room."
            if fit.log
            else f"What kvp-edge chooses by itself does not fit, so this is {fit.types}."
        )
    if length <= fit.limits.cells:
        yield f"All {length} tokens fit in full: nothing is dropped."
    elif not args.flash_attn and not fit.types.quantised_values and fit.compute_weighs:
        yield (
            "The compute buffers are large beside the cells. With --flash-attn they are smaller, "
            "and more cells fit; how fast it reads then depends on the types."
        )
    if fit.lost and args.recall != "off":
        yield (
            f"The log has room for the keys and values of {length - fit.lost} tokens. To keep all "
            f"{length} for recall, raise --kv-log-limit, or choose a smaller --kv-log-type."
        )


def _missing(found: Sequence[Fit | Missing], planner: Planner) -> str:
    missing = [one for one in found if isinstance(one, Missing)]
    needs = [one.needs for one in missing if not one.why]
    if not needs:
        return "; ".join(f"{one.types} is not possible: {one.why}" for one in missing)
    least = min(needs)
    text = (
        f"nothing fits into --memory {_size(planner.memory)}: the smallest cache, with the weights "
        f"and all else, takes {_size(least)}, which is {_size(least - planner.memory)} more"
    )
    if planner.weights < planner.memory:
        text += ". The log is part of it: --kv-log FILE puts it into a file, --recall off omits it"
    return text


def _command(args: Options, given: dict[str, Any]) -> str:
    """``kvp-edge chat`` with these options and those of ``args`` that are not the default."""
    words = ["kvp-edge", "chat"]
    if args.model is not None:
        words.append(args.model)
    names = {**names_of(Options), "kv_budget": OPTIONS["kv_budget"].flag}
    left_out = {one.name for one in fields(_Asked)} | {"model", "verbose"} | given.keys()
    for one in fields(Options):
        value = getattr(args, one.name)
        default = one.default if one.default is not MISSING else None
        if one.name not in left_out and value != default:
            given[one.name] = value
    for name, value in given.items():
        words += [names[name]] if value is True else [names[name], str(value)]
    return shlex.join(words)


def _mib(n_bytes: int) -> str:
    """To a hundredth, as llama.cpp reports."""
    return f"{n_bytes / 2**20:.2f}"


def _size(n_bytes: int) -> str:
    return f"{_mib(n_bytes)} MiB"


COMMAND = Command(
    _main,
    Options,
    "Show what fits into so much memory: cells of every type, beside weights, buffers and log.",
    _EPILOG,
)
