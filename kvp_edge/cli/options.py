"""Options that several commands share, and the model they describe."""

from __future__ import annotations

import importlib
import os
import secrets
import warnings
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import typer

from kvp_edge.argument_checks import MAX_THREADS
from kvp_edge.binding.model import read_model_shape
from kvp_edge.bundled import bundled_model
from kvp_edge.cache.limits import parse_budget
from kvp_edge.cache.options import DEFAULT_BUDGET, OPTIONS
from kvp_edge.cache.types import CACHE_TYPES, ggml_type
from kvp_edge.cli.parameters import argument, option, reader
from kvp_edge.cli.progress import WatchedLlama
from kvp_edge.llama import Llama
from kvp_edge.llamacpp.log import listen

_Loaded = TypeVar("_Loaded", bound=Llama)

#: Batches of a few dozen tokens keep a processor waiting for memory.
_SMALL_BATCH = 128


def threads(text: str) -> int:
    """A number of threads that ggml can start."""
    n = int(reader(int, least=1)(text))
    if n > MAX_THREADS:
        raise typer.BadParameter(
            f"must be at most {MAX_THREADS}, not {n}: that is ggml's limit, and more threads "
            f"than the {os.cpu_count()} processors of this machine do not help"
        )
    return n


def text(argument: str) -> str:
    """What was typed: bytes that are no UTF-8 become replacement marks, as in a file."""
    return argument.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


_MODEL, _CACHE, _REPLY = "model", "bounded cache", "reply"
CHAT_TEMPLATE = "chat template"


def llama_option(name: str, panel: str, *, default: Any = None, **said: Any) -> Any:
    """A field for an option of ``kvp_edge.Llama``, which says of itself what it is for.

    Args:
        default: the command's own; None: that of Llama.
        said: see ``option``; besides or instead of what it says.
    """
    one = OPTIONS[name]
    said = {"help": one.help, "metavar": one.metavar or None, "shown": one.means or True, **said}
    if default is not None:
        said["shown"] = True
    return option(one.default if default is None else default, panel=panel, **said)


def verbose_option() -> Any:
    """--verbose of commands that load no model, whose log there would be to show."""
    return option(False, help="show tracebacks of errors")


@dataclass(frozen=True, kw_only=True)
class RepackOption:
    repack: str = llama_option("repack", _MODEL, choices=OPTIONS["repack"].choices)


@dataclass(frozen=True, kw_only=True)
class _ModelOptions:
    model: str | None = argument(
        None,
        panel=_MODEL,
        metavar="MODEL.gguf",
        help="default: the bundled model",
    )
    hf_repo: str | None = option(
        None, panel=_MODEL, metavar="REPO", help="download the model from this repository"
    )
    hf_file: str | None = option(
        None, panel=_MODEL, metavar="FILE", help="the GGUF file in --hf-repo"
    )
    threads: int | None = option(
        None,
        panel=_MODEL,
        metavar="N",
        parse=threads,
        shown="all processors for reading, half of them for writing",
        help="number of CPU threads",
    )
    gpu_layers: int = option(0, panel=_MODEL, metavar="N", help="layers on the GPU; -1: all")
    flash_attn: bool = option(False, panel=_MODEL, help="use flash attention")
    type_k: str | None = option(
        None,
        panel=_MODEL,
        metavar="TYPE",
        choices=CACHE_TYPES,
        shown="f16",
        help=f"keys in the cache: {', '.join(CACHE_TYPES)}",
    )
    type_v: str | None = option(
        None,
        panel=_MODEL,
        metavar="TYPE",
        choices=CACHE_TYPES,
        shown="f16",
        help="values in the cache; quantised types need --flash-attn, which --kv-type (kvp-edge "
        "trace and learn, too) turns on by itself",
    )


@dataclass(frozen=True, kw_only=True)
class ModelOptions(RepackOption, _ModelOptions):
    """Which model, and how it is computed."""

    verbose: bool = option(
        False, panel=_MODEL, help="show llama.cpp's log, and tracebacks of errors"
    )


def n_ctx_option(default: str) -> Any:
    """
    Args:
        default: what it is, in words.
    """
    return llama_option("n_ctx", _CACHE, least=1, shown=default)


@dataclass(frozen=True, kw_only=True)
class _BudgetFlag:
    kv_budget: str = llama_option("kv_budget", _CACHE, default=DEFAULT_BUDGET)


@dataclass(frozen=True, kw_only=True)
class CacheWays:
    """How a cache is bounded, but for its size. Each is named after a field of
    kvp_edge.CacheOptions."""

    kv_type: str = llama_option("kv_type", _CACHE)
    policy: str = llama_option("policy", _CACHE)
    granularity: str = llama_option("granularity", _CACHE)
    positions: str = llama_option("positions", _CACHE)
    keep_whole: str = llama_option("keep_whole", _CACHE)
    isolate_turns: bool = llama_option("isolate_turns", _CACHE)
    sinks: int = llama_option("sinks", _CACHE)
    recent: int | None = llama_option("recent", _CACHE)
    reserve: int | None = llama_option("reserve", _CACHE)
    pack: str = llama_option("pack", _CACHE)
    recall: str = llama_option("recall", _CACHE)
    recall_every: int = llama_option("recall_every", _CACHE)
    kv_log: str | None = llama_option("kv_log", _CACHE)
    kv_log_limit: str = llama_option("kv_log_limit", _CACHE)
    kv_log_type: str = llama_option("kv_log_type", _CACHE)


@dataclass(frozen=True, kw_only=True)
class CacheFlags(CacheWays, _BudgetFlag):
    """The flags that bound the cache."""


@dataclass(frozen=True, kw_only=True)
class SystemOptions:
    system: str | None = option(
        None, metavar="TEXT", parse=text, help="system prompt; it is never dropped"
    )
    no_protect_system: bool = option(False, help="allow the system prompt to be dropped")


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How a reply is written."""

    max_tokens: int = option(512, panel=_REPLY, metavar="N", least=1, help="longest reply")
    temperature: float = option(
        0.7,
        panel=_REPLY,
        metavar="X",
        help="randomness of the reply; 0: always the likeliest token",
    )
    top_p: float = option(
        0.95,
        panel=_REPLY,
        metavar="X",
        help="choose among the likeliest tokens that have this probability together",
    )
    top_k: int = option(40, panel=_REPLY, metavar="N", help="choose among the N likeliest tokens")
    min_p: float = option(
        0.05,
        panel=_REPLY,
        metavar="X",
        help="least probability of a token, relative to the likeliest",
    )
    seed: int | None = option(
        None,
        panel=_REPLY,
        metavar="N",
        shown="random",
        help="random seed, for a reply that can be repeated",
    )


@dataclass(frozen=True, kw_only=True)
class CacheAndModelOptions(CacheFlags, ModelOptions):
    """A model with a bounded cache, and how it reads messages."""

    special_in_messages: bool = llama_option("special_in_messages", CHAT_TEMPLATE)


@dataclass(frozen=True, kw_only=True)
class BoundedOptions(SystemOptions, CacheAndModelOptions):
    """The same, and a system prompt."""


def sampling(args: SamplingOptions) -> dict[str, Any]:
    """Keyword arguments for create_chat_completion and create_completion, but for the seed."""
    return {
        "max_tokens": args.max_tokens,
        "temperature": args.temperature,
        "top_p": args.top_p,
        "top_k": args.top_k,
        "min_p": args.min_p,
    }


def first_seed(args: SamplingOptions) -> int:
    """--seed, or a random one. llama_cpp would use the same seed in every process otherwise."""
    return secrets.randbits(31) if args.seed is None else int(args.seed)


def model_path(args: ModelOptions) -> str:
    """The model file the user means, downloaded first if it is in a repository."""
    if args.hf_repo or args.hf_file:
        if args.model:
            raise ValueError("give either MODEL.gguf or --hf-repo and --hf-file, not both")
        if not (args.hf_repo and args.hf_file):
            raise ValueError("--hf-repo and --hf-file must be given together")
        return _download(args.hf_repo, args.hf_file)
    if args.model is None:
        return bundled_model()
    if not os.path.exists(args.model):
        raise FileNotFoundError(
            f"model file '{args.model}' not found. Give the path of a GGUF file, "
            "download one with --hf-repo and --hf-file, or give none to use the bundled model"
        )
    return str(args.model)


def _download(repo: str, file: str) -> str:
    try:
        hub = importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise ImportError(
            "--hf-repo needs the package huggingface_hub: pip install 'kvp_edge[hub]'"
        ) from error
    return str(hub.hf_hub_download(repo, file))


def engine_options(args: ModelOptions) -> dict[str, Any]:
    """Keyword arguments of llama_cpp.Llama that say how, not what, to compute."""
    return {
        "n_threads": args.threads,
        "n_threads_batch": args.threads,
        "n_gpu_layers": args.gpu_layers,
        "repack": args.repack,
        "verbose": args.verbose,
        # what nobody asked for is left to kv_type
        **({"flash_attn": True} if args.flash_attn else {}),
        **({"type_k": ggml_type(args.type_k)} if args.type_k else {}),
        **({"type_v": ggml_type(args.type_v)} if args.type_v else {}),
    }


def cache_options(args: CacheFlags) -> dict[str, Any]:
    """Keyword arguments of kvp_edge.Llama that bound the cache, but for ``n_ctx``."""
    given = {one.name: getattr(args, one.name) for one in fields(CacheFlags)}
    return {**given, "kv_budget": parse_budget(args.kv_budget)}


def load(path: str, n_ctx: int | None, args: BoundedOptions) -> WatchedLlama:
    """The bounded model that the options describe, with its system prompt."""
    protects = bool(args.system) and not args.no_protect_system
    return load_as(WatchedLlama, path, n_ctx, args, protect_system=protects)


def load_as(
    kind: type[_Loaded],
    path: str,
    n_ctx: int | None,
    args: CacheAndModelOptions,
    *,
    protect_system: bool,
) -> _Loaded:
    """The bounded model that the options describe.

    Args:
        kind: its class.
    """
    llm = kind(
        path,
        n_ctx=n_ctx,
        protect_system=protect_system,
        special_in_messages=args.special_in_messages,
        **cache_options(args),
        **engine_options(args),
    )
    stats, memory = llm.kv_stats, isinstance(parse_budget(args.kv_budget), str)
    if memory and args.reserve is None and stats.cells < llm.n_ctx() and llm.n_batch < _SMALL_BATCH:
        warnings.warn(
            f"reading is slow, {llm.n_batch} tokens at a time, because an eviction frees no more "
            f"of the {stats.cells} cells: raise --kv-budget or --reserve",
            stacklevel=2,
        )
    return llm


def trained_context(path: str) -> int:
    """The longest text that a model file says its model was trained on, in tokens."""
    with listen(pass_on=False):  # what is wrong with the file becomes the exception's message
        return read_model_shape(path).n_ctx_train


def warn_beyond_training(n_tokens: int, path: str, args: CacheWays) -> None:
    """Say so if a text is longer than any that the model has been trained on."""
    if args.positions == "compact":
        return
    trained = trained_context(path)
    if n_tokens > trained:
        warnings.warn(
            f"up to {n_tokens} tokens will be read, but the model was trained for {trained}: "
            "replies may get worse beyond that (--positions compact avoids this)",
            stacklevel=2,
        )
