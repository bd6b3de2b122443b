"""Options that several commands share, and the model they describe."""

from __future__ import annotations

import argparse
import importlib
import os
import secrets
import warnings
from importlib import resources
from typing import Any

from kvp_edge.binding.model import read_model_shape
from kvp_edge.cache.limits import DEFAULT_SINKS, parse_budget
from kvp_edge.cli.progress import WatchedLlama
from kvp_edge.llamacpp.log import listen
from kvp_edge.policies import FALLBACK, POLICIES
from kvp_edge.processor.repack import REPACK

DEFAULT_BUDGET = "512"
#: Batches of a few dozen tokens keep a processor waiting for memory.
_SMALL_BATCH = 128
_MOST_THREADS = 512  # GGML_MAX_N_THREADS in ggml.h

# enum ggml_type in ggml.h; llama_cpp has no name for bf16
_CACHE_TYPES = {
    "f32": 0,
    "f16": 1,
    "bf16": 30,
    "q8_0": 8,
    "q5_1": 7,
    "q5_0": 6,
    "q4_1": 3,
    "q4_0": 2,
}


def count(text: str) -> int:
    """An argparse type: a whole number of at least 1."""
    n = int(text)
    if n < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {n}")
    return n


def threads(text: str) -> int:
    """An argparse type: a number of threads that ggml can start."""
    n = count(text)
    if n > _MOST_THREADS:
        raise argparse.ArgumentTypeError(
            f"must be at most {_MOST_THREADS}, not {n}: ggml starts no more, and more than the "
            f"{os.cpu_count()} processors of this machine only wait for each other"
        )
    return n


def text(argument: str) -> str:
    """An argparse type: bytes that are no UTF-8 become replacement marks, as in a file."""
    return argument.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "model", nargs="?", metavar="MODEL.gguf", help="default: the small model that comes along"
    )
    group.add_argument("--hf-repo", metavar="REPO", help="download the model from this repository")
    group.add_argument("--hf-file", metavar="FILE", help="the GGUF file in --hf-repo")
    group.add_argument(
        "--threads",
        type=threads,
        metavar="N",
        help="default: all processors to read, half of them to write",
    )
    group.add_argument(
        "--gpu-layers",
        type=int,
        default=0,
        metavar="N",
        help="layers on the GPU; -1: all (default: 0)",
    )
    group.add_argument("--flash-attn", action="store_true", help="use flash attention")
    group.add_argument(
        "--type-k", choices=_CACHE_TYPES, default="f16", help="keys in the cache (default: f16)"
    )
    group.add_argument(
        "--type-v",
        choices=_CACHE_TYPES,
        default="f16",
        help="values in the cache (default: f16); quantised types need --flash-attn "
        "(kvp-edge trace and learn turn it on by themselves)",
    )
    add_repack_option(group)
    group.add_argument(
        "--verbose", action="store_true", help="show llama.cpp's log, and tracebacks of errors"
    )


def add_repack_option(group: Any) -> None:
    group.add_argument(
        "--repack",
        choices=REPACK,
        default="auto",
        help="lay out weights on the CPU anew for this processor, mostly for more speed; "
        "auto: if that works here, which is tried once in a process of its own (default: auto; see "
        "kvp-edge doctor)",
    )


def add_cache_options(parser: argparse.ArgumentParser, n_ctx_default: str) -> None:
    group = parser.add_argument_group("bounded cache")
    group.add_argument(
        "--kv-budget",
        default=DEFAULT_BUDGET,
        metavar="N",
        help="tokens that stay after an eviction, or the memory of the whole cache like 256MiB "
        f"(default: {DEFAULT_BUDGET})",
    )
    group.add_argument(
        "--n-ctx",
        type=count,
        metavar="N",
        help="logical context: the longest conversation, in tokens; it costs next to no memory "
        f"(default: {n_ctx_default})",
    )
    group.add_argument(
        "--policy",
        default="auto",
        metavar="NAME",
        help=f"who chooses: {', '.join(POLICIES)}, a policy file, or auto: the policy trained for "
        f"the model, if there is one, else {FALLBACK} (default: auto; see kvp-edge policies)",
    )
    group.add_argument(
        "--granularity",
        default="head",
        metavar="WHO",
        help="head: every attention head keeps its own tokens; token: a token is dropped from all "
        "layers and heads at once; auto: head where model and cache allow it (default: head)",
    )
    group.add_argument(
        "--positions",
        default="keep",
        metavar="HOW",
        help="keep: for life; compact: moved to the front when they would pass what the model was "
        "trained for, so that a conversation never has to end (default: keep)",
    )
    group.add_argument(
        "--keep-whole",
        default="tokens",
        metavar="WHAT",
        help="what stays or goes as a whole, besides the marks of the chat template: tokens "
        "(nothing), words or sentences (default: tokens)",
    )
    group.add_argument(
        "--isolate-turns",
        action="store_true",
        help="do not thin out what was kept of finished messages again, as long as new ones find a "
        "quarter of the room",
    )
    group.add_argument(
        "--sinks",
        type=int,
        default=DEFAULT_SINKS,
        metavar="N",
        help=f"first tokens that are never dropped (default: {DEFAULT_SINKS})",
    )
    group.add_argument(
        "--recent",
        type=int,
        metavar="N",
        help="newest tokens that are never dropped (default: a quarter of the budget, at most 256)",
    )
    group.add_argument(
        "--reserve",
        type=int,
        metavar="N",
        help="free cells after an eviction (default: a quarter of the budget, at least 256; a "
        "fifth of the cells where the budget is memory)",
    )
    group.add_argument(
        "--pack",
        choices=["auto", "device", "state"],
        default="auto",
        help="device: score and pack the cache where it lies, so that on a GPU only cell numbers "
        "and scores cross the bus; state: through llama.cpp's state, out and back in; auto: device "
        "where possible (default: auto)",
    )


def add_system_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--system", type=text, metavar="TEXT", help="system prompt; it is never dropped"
    )
    parser.add_argument(
        "--no-protect-system", action="store_true", help="the system prompt may be dropped, too"
    )


def add_sampling_options(
    parser: argparse.ArgumentParser, temperature: float, max_tokens: int
) -> None:
    group = parser.add_argument_group("reply")
    group.add_argument(
        "--max-tokens",
        type=count,
        default=max_tokens,
        metavar="N",
        help=f"longest reply (default: {max_tokens})",
    )
    group.add_argument(
        "--temperature",
        type=float,
        default=temperature,
        metavar="X",
        help=f"0: always the likeliest token (default: {temperature:g})",
    )
    group.add_argument("--top-p", type=float, default=0.95, metavar="X", help="default: 0.95")
    group.add_argument("--top-k", type=int, default=40, metavar="N", help="default: 40")
    group.add_argument("--min-p", type=float, default=0.05, metavar="X", help="default: 0.05")
    group.add_argument(
        "--seed", type=int, metavar="N", help="for a reply that can be repeated (default: random)"
    )


def sampling(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments for create_chat_completion and create_completion, but for the seed."""
    return {
        "max_tokens": args.max_tokens,
        "temperature": args.temperature,
        "top_p": args.top_p,
        "top_k": args.top_k,
        "min_p": args.min_p,
    }


def first_seed(args: argparse.Namespace) -> int:
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


def model_path(args: argparse.Namespace) -> str:
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


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of llama_cpp.Llama that say how, not what, to compute."""
    return {
        "n_threads": args.threads,
        "n_threads_batch": args.threads,
        "n_gpu_layers": args.gpu_layers,
        "flash_attn": args.flash_attn,
        "type_k": _CACHE_TYPES[args.type_k],
        "type_v": _CACHE_TYPES[args.type_v],
        "repack": args.repack,
        "verbose": args.verbose,
    }


def cache_options(args: argparse.Namespace) -> dict[str, Any]:
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


def load(path: str, n_ctx: int | None, args: argparse.Namespace) -> WatchedLlama:
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


def warn_beyond_training(n_tokens: int, path: str, args: argparse.Namespace) -> None:
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
