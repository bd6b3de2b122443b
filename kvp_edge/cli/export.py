"""``kvp-edge export``: a trained policy as GGUF and ONNX."""

from __future__ import annotations

import argparse
import importlib
from typing import Any

from kvp_edge.binding.model import read_model_shape
from kvp_edge.cli.shown import say
from kvp_edge.cli.train import open_traces, require_torch
from kvp_edge.llamacpp.log import listen
from kvp_edge.policy_file import check_model

_EPILOG = """\
The files are then scored against PyTorch; what does not agree is an error. The last line of the
output is the name of the policy file.

examples:
  kvp-edge export run                                 kvp-<model>-w<context>-F16.gguf in run
  kvp-edge export run --outtype q8_0 --onnx --traces traces
  kvp-edge export run --outfile kvp-{ftype}.gguf --base model.gguf"""


def add_export(commands: Any) -> None:
    parser = commands.add_parser(
        "export",
        help="turn a trained policy into a policy file",
        description="Turn the policy of a training run into GGUF, and ONNX if wanted.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", metavar="RUN", help="training folder or .safetensors file")
    parser.add_argument(
        "--outfile",
        metavar="FILE",
        help="default: a derived name beside the checkpoint; {ftype} becomes the type",
    )
    parser.add_argument(
        "--outtype",
        choices=("f32", "f16", "q8_0"),
        default="f16",
        help="of the large weights (default: f16)",
    )
    parser.add_argument("--onnx", action="store_true", help="write ONNX as well, beside the GGUF")
    parser.add_argument(
        "--traces", metavar="DIR", help="traces for the check (default: random tokens)"
    )
    parser.add_argument("--base", metavar="MODEL.gguf", help="the model: the policy must fit it")
    parser.add_argument("--license", default="", metavar="NAME", help="licence of the policy")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be written")
    parser.add_argument("--verbose", action="store_true", help="show tracebacks of errors")
    parser.set_defaults(command=_main)


def _main(args: argparse.Namespace) -> int:
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
        f"compared with PyTorch on {p.checked} (largest difference of a score; kept tokens in "
        "common):",
        f"  the file's weights, run natively  {p.executor:.1e}   {p.kept:.2%} at the worst budget",
    ]
    if p.onnx is not None:
        lines.append(
            f"  ONNX, run by onnxruntime          {p.onnx:.1e}   {p.onnx_kept:.2%} at the worst "
            "budget"
        )
    elif done.onnx is not None:
        lines.append("  ONNX was checked but not run: pip install 'kvp_edge[onnx]'")
    lines.append(
        f"  rounding to {outtype:22}{p.rounding:.1e}   {p.rounding_kept:.2%} mean over budgets"
    )
    return "\n".join(lines)
