"""``kvp-edge export``: a trained policy as GGUF and ONNX."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import typer

from kvp_edge.binding.model import read_model_shape
from kvp_edge.cache.types import KVTypes
from kvp_edge.cli.options import verbose_option
from kvp_edge.cli.parameters import argument, option
from kvp_edge.cli.shown import say
from kvp_edge.cli.subcommands import Command
from kvp_edge.cli.train import open_traces, require_torch
from kvp_edge.errors import OptionError
from kvp_edge.llamacpp.log import listen
from kvp_edge.policy_file import check_model

_EPILOG = """\
The scores of the files are then compared with PyTorch's; a disagreement is an error. The last line
of the output is the path of the policy file.

examples:
  kvp-edge export run        (writes kvp-<model>-w<context>-F16.gguf in run)
  kvp-edge export run --outtype q8_0 --onnx --traces traces
  kvp-edge export run --outfile kvp-{ftype}.gguf --base model.gguf"""


def _kv_type(text: str) -> str:
    try:
        return str(KVTypes.parse("it", text)) if text else ""
    except OptionError as error:
        raise typer.BadParameter(str(error)) from None


@dataclass(frozen=True, kw_only=True)
class Options:
    checkpoint: str = argument(..., metavar="RUN", help="training folder or .safetensors file")
    outfile: str | None = option(
        None,
        metavar="FILE",
        shown="beside the checkpoint, with a derived name",
        help="{ftype} in it becomes the type",
    )
    outtype: str = option("f16", choices=("f32", "f16", "q8_0"), help="type of the large weights")
    onnx: bool = option(False, help="also write ONNX, beside the GGUF")
    traces: str | None = option(
        None, metavar="DIR", shown="random tokens", help="traces for the check"
    )
    base: str | None = option(
        None, metavar="MODEL.gguf", help="the model, to check that the policy fits it"
    )
    license: str = option("", metavar="NAME", help="licence of the policy")
    kv_type: str = option(
        "",
        metavar="TYPE",
        parse=_kv_type,
        help="cache types that suit the model, such as q8_0/q4_0: what --kv-type auto chooses when "
        "it finds this policy",
    )
    dry_run: bool = option(False, help="print what would be written, and exit")
    verbose: bool = verbose_option()


def _main(args: Options) -> int:
    require_torch("export")
    package = importlib.import_module("kvp_edge.export")
    shape = None
    if args.base:
        with listen(pass_on=args.verbose):
            shape = read_model_shape(args.base)
    options = {
        "outfile": args.outfile,
        "outtype": args.outtype,
        "onnx": args.onnx,
        "architecture": shape.architecture if shape else "",
        "license": args.license,
        "kv_type": args.kv_type,
    }
    planned = package.export(args.checkpoint, **options, dry_run=True)
    if shape is not None and not shape.sliding_window:  # a window's layers are not in the cache
        check_model(
            planned.info,
            architecture=shape.architecture,
            n_layer=shape.n_layer,
            n_head_kv=shape.n_head_kv[0],
            head_size_k=shape.head_size_k,
            head_size_v=shape.head_size_v,
        )
    if args.dry_run:
        say(str(planned.onnx or "no ONNX"))
        say(str(planned.gguf))
        return 0
    traces = open_traces(args.traces) if args.traces else None
    done = package.export(args.checkpoint, **options, traces=traces)
    say(_told(done, args.outtype))
    if done.onnx is not None:
        say(str(done.onnx))
    say(str(done.gguf))
    return 0


def _told(done: Any, outtype: str) -> str:
    p = done.parity
    lines = [
        f"compared with PyTorch on {p.checked} (largest difference of a score; share of kept "
        "tokens in common):",
        f"  the file's weights, run natively  {p.executor:.1e}   {p.kept:.2%} at the worst budget",
    ]
    if p.onnx is not None:
        lines.append(
            f"  ONNX, run by onnxruntime          {p.onnx:.1e}   {p.onnx_kept:.2%} at the worst "
            "budget"
        )
    elif done.onnx is not None:
        lines.append("  ONNX was checked but not run; to run it: pip install 'kvp_edge[onnx]'")
    lines.append(
        f"  rounding to {outtype:22}{p.rounding:.1e}   {p.rounding_kept:.2%} mean over budgets"
    )
    return "\n".join(lines)


COMMAND = Command(
    _main, Options, "Write the policy of a training run as GGUF, and as ONNX if wanted.", _EPILOG
)
