"""``kvp-edge sensitivity``: how much each attention head's memory is worth to a model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from importlib import resources
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from kvp_edge.binding.fingerprint import model_fingerprint, model_identity
from kvp_edge.cli.options import verbose_option
from kvp_edge.cli.parameters import argument, option
from kvp_edge.cli.shown import say
from kvp_edge.cli.subcommands import Command
from kvp_edge.cli.tables import table
from kvp_edge.cli.train import require_torch
from kvp_edge.corpora import EVALUATION_PROSE
from kvp_edge.files import write_whole
from kvp_edge.llama import Llama
from kvp_edge.policy_file import check_model, outtype_of, read_info, read_policy, write_policy
from kvp_edge.traces.sources import Cut, TextFile

if TYPE_CHECKING:
    from kvp_edge.training.sensitivity import Sensitivity
    from kvp_edge.training.twin import Twin

_EPILOG = """\
A head is sensitive if the loss of later text rises when this head alone drops tokens. The first
half of each text is read; then one head keeps its first and newest tokens only (--sinks, --recent,
--share), and the loss of the second half counts. The table shows each head's share, relative to the
mean of all heads.

Without --exact, the rise is estimated from slopes, with one forward and one backward pass for all
heads. --exact takes one forward pass per head.

The model runs in PyTorch: llama, qwen2, qwen3, gemma3, phi3.

examples:
  kvp-edge sensitivity model.gguf
  kvp-edge sensitivity model.gguf --text books/*.txt --texts 8 --out heads.json
  kvp-edge sensitivity model.gguf --policy kvp-model.gguf   (stores them)"""

_EVICTION = "what a head that drops tokens keeps"


@dataclass(frozen=True, kw_only=True)
class Options:
    model: str = argument(..., metavar="MODEL", help="model file (.gguf)")
    text: list[str] = option(
        (), metavar="FILE ...", help="text files to measure on (default: the bundled novel)"
    )
    length: int = option(512, metavar="N", least=2, help="tokens of a text")
    texts: int = option(4, metavar="N", least=1, help="number of texts, evenly spaced")
    exact: bool = option(False, help="measure each head in a pass of its own")
    sinks: int = option(4, panel=_EVICTION, metavar="N", least=0, help="first tokens")
    recent: int = option(32, panel=_EVICTION, metavar="N", least=0, help="newest tokens")
    share: float = option(
        0.0, panel=_EVICTION, metavar="X", help="share of the tokens between, evenly spaced"
    )
    out: str | None = option(None, metavar="FILE", shown=False, help="write the figures, as JSON")
    policy: str | None = option(
        None, metavar="FILE", shown=False, help="policy file to store the result in"
    )
    device: str = option("cpu", metavar="NAME", help="cpu or cuda")
    threads: int | None = option(
        None, metavar="N", least=1, shown="PyTorch's choice", help="CPU threads"
    )
    verbose: bool = verbose_option()


def _main(args: Options) -> int:
    require_torch("measuring heads")
    import torch  # noqa: PLC0415

    from kvp_edge.training.sensitivity import Eviction, head_sensitivity  # noqa: PLC0415
    from kvp_edge.training.twin import Twin  # noqa: PLC0415

    if args.threads:
        torch.set_num_threads(args.threads)
    eviction = Eviction(args.sinks, args.recent, args.share)
    twin = Twin.load(args.model, args.device)
    if args.policy:
        _check_fits(args.policy, args.model, twin)
    texts = _texts(args.model, args.text, args.length, args.texts)
    with tqdm(unit="pass", disable=None) as bar:

        def show(done: int, of: int) -> None:
            bar.total = of
            bar.update(done - bar.n)

        found = head_sensitivity(twin, texts, eviction, exact=args.exact, progress=show)
    for line in _lines(found):
        say(line)
    if args.out:
        how = {"length": args.length, "texts": len(texts), "exact": args.exact}
        _write(args.out, args.model, how | asdict(eviction), found)
    if args.policy:
        info, weights = read_policy(args.policy)
        weights = replace(weights, sensitivity=found.weights)
        write_policy(args.policy, info, weights, outtype_of(args.policy))
        say(f"stored in '{args.policy}'")
    return 0


def _check_fits(policy: str, model: str, twin: Twin) -> None:
    """Before anything is measured.

    Raises:
        PolicyFileError: not a policy file, or for another model.
    """
    check_model(
        read_info(policy),
        architecture=twin.architecture,
        n_layer=twin.n_layer,
        n_head_kv=twin.n_head_kv,
        head_size_k=twin.head_size_k,
        head_size_v=twin.head_size_v,
        fingerprint=model_fingerprint(model),
        model_identity=model_identity(model),
    )


def _texts(model: str, files: Sequence[str], length: int, n: int) -> list[list[int]]:
    """Token ids of ``n`` texts, evenly spaced among all that the files hold.

    Raises:
        ValueError: they hold fewer.
    """
    with ExitStack() as stack:
        llm = stack.enter_context(closing(Llama(model, vocab_only=True, verbose=False)))
        if not files:
            novel = resources.files("kvp_edge") / "data" / EVALUATION_PROSE
            files = [str(stack.enter_context(resources.as_file(novel)))]
        cut = Cut(length, "text", length // 2, 0)
        all_of_them = [
            list(piece.tokens) for file in files for piece in TextFile(file).pieces(llm, cut)
        ]
    if len(all_of_them) < n:
        raise ValueError(
            f"the files hold {len(all_of_them)} texts of {length} tokens, fewer than {n}: lower "
            "--texts or --length, or name more files with --text"
        )
    return [all_of_them[i * len(all_of_them) // n] for i in range(n)]


def _lines(found: Sensitivity) -> list[str]:
    weights = found.weights
    n_layer, n_head = weights.shape
    head = [("layer", 6), *((f"head {h}", 8) for h in range(n_head)), ("mean", 8)]
    rows = [
        [str(layer), *(f"{weight:.2f}" for weight in row), f"{row.mean():.2f}"]
        for layer, row in enumerate(weights)
    ]
    half, n = found.heads_with_half(), n_layer * n_head
    heaviest, at = divmod(int(weights.argmax()), n_head)
    return [
        *table(head, rows),
        f"Half is carried by {half} of {n} heads ({100 * half / n:.0f} %). The heaviest is head "
        f"{at} of layer {heaviest}: without what it drops, the loss rises by "
        f"{found.rise.max():.4f} nats per token.",
    ]


def _write(path: str, model: str, how: dict[str, Any], found: Sensitivity) -> None:
    what = {
        "fingerprint": model_fingerprint(model),
        "identity": model_identity(model),
        **how,
        "rise": found.rise.tolist(),
        "weights": found.weights.tolist(),
    }
    write_whole(path, (json.dumps(what) + "\n").encode())


COMMAND = Command(
    _main,
    Options,
    "Measure how much of a model's loss hangs on what each attention head remembers.",
    _EPILOG,
)
