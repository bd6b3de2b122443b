"""Options that several commands share, and the model they describe."""

from __future__ import annotations

import importlib
import os
import secrets
import warnings
from dataclasses import dataclass
from importlib import resources
from typing import Any

import typer
from gguf import GGMLQuantizationType

from kvp_edge.arguments import MAX_THREADS
from kvp_edge.binding.model import read_model_shape
from kvp_edge.cache.limits import DEFAULT_SINKS, parse_budget
from kvp_edge.cli.parameters import argument, option, reader
from kvp_edge.cli.progress import WatchedLlama
from kvp_edge.llamacpp.log import listen
from kvp_edge.policies import FALLBACK, POLICIES
from kvp_edge.processor.repack import REPACK

DEFAULT_BUDGET = "512"
#: Batches of a few dozen tokens keep a processor waiting for memory.
_SMALL_BATCH = 128
#: Names of --type-k and --type-v, most exact first.
_CACHE_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")


def threads(text: str) -> int:
    """A number of threads that ggml can start."""
    n = int(reader(int, least=1)(text))
    if n > MAX_THREADS:
        raise typer.BadParameter(
            f"must be at most {MAX_THREADS}, not {n}: ggml starts no more, and more than the "
            f"{os.cpu_count()} processors of this machine only wait for each other"
        )
    return n


def text(argument: str) -> str:
    """What was typed: bytes that are no UTF-8 become replacement marks, as in a file."""
    return argument.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


_MODEL, _CACHE, _REPLY = "model", "bounded cache", "reply"


@dataclass(frozen=True, kw_only=True)
class VerboseOption:
    verbose: bool = option(False, help="show tracebacks of errors")


@dataclass(frozen=True, kw_only=True)
class RepackOption:
    repack: str = option(
        "auto",
        panel=_MODEL,
        choices=REPACK,
        help="lay out weights on the CPU anew for this processor, mostly for more speed; auto: if "
        "that works here, which is tried once in a process of its own (see kvp-edge doctor)",
    )


@dataclass(frozen=True, kw_only=True)
class _ModelOptions:
    model: str | None = argument(
        None,
        panel=_MODEL,
        metavar="MODEL.gguf",
        help="default: the small model that comes along",
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
        shown="all processors to read, half of them to write",
        help="how many work at once",
    )
    gpu_layers: int = option(0, panel=_MODEL, metavar="N", help="layers on the GPU; -1: all")
    flash_attn: bool = option(False, panel=_MODEL, help="use flash attention")
    type_k: str = option(
        "f16",
        panel=_MODEL,
        metavar="TYPE",
        choices=_CACHE_TYPES,
        help=f"keys in the cache: {', '.join(_CACHE_TYPES)}",
    )
    type_v: str = option(
        "f16",
        panel=_MODEL,
        metavar="TYPE",
        choices=_CACHE_TYPES,
        help="values in the cache; quantised types need --flash-attn (kvp-edge trace and learn "
        "turn it on by themselves)",
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
    return option(
        None,
        panel=_CACHE,
        metavar="N",
        least=1,
        shown=default,
        help="logical context: the longest conversation, in tokens; it costs next to no memory",
    )


@dataclass(frozen=True, kw_only=True)
class CacheOptions:
    """What bounds the cache: arguments of ``kvp_edge.Llama``, by the same names."""

    kv_budget: str = option(
        DEFAULT_BUDGET,
        panel=_CACHE,
        metavar="N",
        help="tokens that stay after an eviction, or the memory of the whole cache like 256MiB",
    )
    policy: str = option(
        "auto",
        panel=_CACHE,
        metavar="NAME",
        help=f"who chooses: {', '.join(POLICIES)}, a policy file, or auto: the policy trained for "
        f"the model, if there is one, else {FALLBACK} (see kvp-edge policies)",
    )
    granularity: str = option(
        "head",
        panel=_CACHE,
        metavar="WHO",
        help="head: every attention head keeps its own tokens; token: a token is dropped from all "
        "layers and heads at once; auto: head where model and cache allow it",
    )
    positions: str = option(
        "keep",
        panel=_CACHE,
        metavar="HOW",
        help="keep: for life; compact: moved to the front when they would pass what the model was "
        "trained for, so that a conversation never has to end",
    )
    keep_whole: str = option(
        "tokens",
        panel=_CACHE,
        metavar="WHAT",
        help="what stays or goes as a whole, besides the marks of the chat template: tokens "
        "(nothing), words or sentences",
    )
    isolate_turns: bool = option(
        False,
        panel=_CACHE,
        help="do not thin out what was kept of finished messages again, as long as new ones find a "
        "quarter of the room",
    )
    sinks: int = option(
        DEFAULT_SINKS, panel=_CACHE, metavar="N", help="first tokens that are never dropped"
    )
    recent: int | None = option(
        None,
        panel=_CACHE,
        metavar="N",
        shown="a quarter of the budget, at most 256",
        help="newest tokens that are never dropped",
    )
    reserve: int | None = option(
        None,
        panel=_CACHE,
        metavar="N",
        shown="a quarter of the budget, at least 256; a fifth of the cells where the budget is "
        "memory",
        help="free cells after an eviction",
    )
    pack: str = option(
        "auto",
        panel=_CACHE,
        choices=("auto", "device", "state"),
        help="device: score and pack the cache where it lies, so that on a GPU only cell numbers "
        "and scores cross the bus; state: through llama.cpp's state, out and back in; auto: device "
        "where possible",
    )


@dataclass(frozen=True, kw_only=True)
class SystemOptions:
    system: str | None = option(
        None, metavar="TEXT", parse=text, help="system prompt; it is never dropped"
    )
    no_protect_system: bool = option(False, help="the system prompt may be dropped, too")


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How a reply is written."""

    max_tokens: int = option(512, panel=_REPLY, metavar="N", least=1, help="longest reply")
    temperature: float = option(
        0.7, panel=_REPLY, metavar="X", help="0: always the likeliest token"
    )
    top_p: float = option(0.95, panel=_REPLY, metavar="X", help="share of the likeliest tokens")
    top_k: int = option(40, panel=_REPLY, metavar="N", help="as many of the likeliest tokens")
    min_p: float = option(
        0.05, panel=_REPLY, metavar="X", help="those at least so likely, the likeliest being 1"
    )
    seed: int | None = option(
        None, panel=_REPLY, metavar="N", shown="random", help="for a reply that can be repeated"
    )


@dataclass(frozen=True, kw_only=True)
class BoundedOptions(SystemOptions, CacheOptions, ModelOptions):
    """A model with a bounded cache."""


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


def bundled_model() -> str:
    """Path of the model that comes with the package."""
    # GGUF files are mapped into memory by name, so the package must be installed as plain files
    folder = resources.files("kvp_edge") / "models"
    files = folder.iterdir() if folder.is_dir() else iter(())
    # kvp-*.gguf are policies (see own_policy)
    names = (file for file in files if not file.name.startswith("kvp-"))
    found = [str(file) for file in names if file.name.endswith(".gguf")]
    if len(found) != 1:
        raise FileNotFoundError(
            f"the package holds {len(found)} models instead of one: reinstall kvp_edge, or name a "
            "model file: kvp-edge chat MODEL.gguf"
        )
    return found[0]


def model_path(args: ModelOptions) -> str:
    """The model file the user means, downloaded first if it is in a repository."""
    if args.hf_repo or args.hf_file:
        if args.model:
            raise ValueError("give either MODEL.gguf or --hf-repo and --hf-file, not both")
        if not (args.hf_repo and args.hf_file):
            raise ValueError("--hf-repo and --hf-file belong together: give both")
        return _download(args.hf_repo, args.hf_file)
    if args.model is None:
        return bundled_model()
    if not os.path.exists(args.model):
        raise FileNotFoundError(
            f"there is no model file '{args.model}'. Give the path of a GGUF file, let "
            "--hf-repo and --hf-file download one, or name none to use the small model that comes "
            "along"
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
        "flash_attn": args.flash_attn,
        "type_k": _ggml_type(args.type_k),
        "type_v": _ggml_type(args.type_v),
        "repack": args.repack,
        "verbose": args.verbose,
    }


def _ggml_type(name: str) -> int:
    return int(GGMLQuantizationType[name.upper()])


def cache_options(args: CacheOptions) -> dict[str, Any]:
    """Keyword arguments of kvp_edge.Llama that bound the cache, but for ``n_ctx``."""
    return {
        "kv_budget": parse_budget(args.kv_budget),
        "policy": args.policy,
        "granularity": args.granularity,
        "positions": args.positions,
        "keep_whole": args.keep_whole,
        "isolate_turns": args.isolate_turns,
        "sinks": args.sinks,
        "recent": args.recent,
        "reserve": args.reserve,
        "pack": args.pack,
    }


def load(path: str, n_ctx: int | None, args: BoundedOptions) -> WatchedLlama:
    """The bounded model that the options describe."""
    llm = WatchedLlama(
        path,
        n_ctx=n_ctx,
        protect_system=bool(args.system) and not args.no_protect_system,
        **cache_options(args),
        **engine_options(args),
    )
    stats, memory = llm.kv_stats, isinstance(parse_budget(args.kv_budget), str)
    if memory and args.reserve is None and stats.cells < llm.n_ctx() and llm.n_batch < _SMALL_BATCH:
        warnings.warn(
            f"texts are read {llm.n_batch} tokens at a time, since an eviction frees no more of "
            f"the {stats.cells} cells, and that is slow: a larger --kv-budget or --reserve helps",
            stacklevel=2,
        )
    return llm


def trained_context(path: str) -> int:
    """The longest text that a model file says its model was trained on, in tokens."""
    with listen(pass_on=False):  # what is wrong with the file becomes the exception's message
        return read_model_shape(path).n_ctx_train


def warn_beyond_training(n_tokens: int, path: str, args: CacheOptions) -> None:
    """Say so if a text is longer than any that the model has been trained on."""
    if args.positions == "compact":
        return
    trained = trained_context(path)
    if n_tokens > trained:
        warnings.warn(
            f"up to {n_tokens} tokens will be read, but the model was trained for {trained}: "
            "replies may get worse beyond that (--positions compact prevents it)",
            stacklevel=2,
        )
