"""The options of a bounded cache, each declared in one place: ``CacheOptions``.

A field there says what the option is by default, what it may be, what it means, and where it
counts. The command line, sessions and evaluations take their options from these fields, README's
table is made of them (scripts/options_table.py), and tests hold ``Llama``'s signature to them.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any, Literal

from kvp_edge.argument_checks import check_callable, check_counts
from kvp_edge.cache.limits import memory_bytes
from kvp_edge.cache.protection import DEFAULT_SINKS
from kvp_edge.cache.recall import Recall
from kvp_edge.cache.stats import Eviction
from kvp_edge.cache.types import CACHE_TYPES, KVTypes
from kvp_edge.errors import BudgetError, OptionError
from kvp_edge.policies import FALLBACK, POLICIES, Policy
from kvp_edge.processor.repack import REPACK
from kvp_edge.text.spans import KEEP_WHOLE

#: ``kv_budget`` of the command line, and of what doctor tries.
DEFAULT_BUDGET = "512"

#: What a saved session is checked against: what was "asked" for, what became of it when the model
#: was loaded ("settled": the limits, the policy's identity...), or nothing, as sessions go on with
#: any value.
Session = Literal["asked", "settled", "any"]


def _about(
    help: str,
    *,
    session: Session,
    choices: tuple[str, ...] = (),
    means: str = "",
    metavar: str = "",
    command_line: bool = True,
    evaluated: bool = False,
) -> dict[str, Any]:
    """What is told of a field of CacheOptions; see Option."""
    return dict(locals())


@dataclass(frozen=True, kw_only=True)
class CacheOptions:
    """How a cache is to be bounded, as ``Llama`` was asked. It is checked as far as that is
    possible without the model.

    Raises:
        OptionError: a value that is none of the option's choices.
        BudgetError: more tokens than llama.cpp can count.
        TypeError: not a whole number, or no function.
    """

    kv_budget: int | str | None = field(
        default=None,
        metadata=_about(
            "tokens kept after an eviction, or the memory of the whole cache, such as 256MiB",
            means="none: llama_cpp's own cache",
            metavar="N",
            session="settled",
        ),
    )
    kv_type: str = field(
        default="auto",
        metadata=_about(
            f"type of the keys and values in the cells: {', '.join(CACHE_TYPES)}; or one for keys "
            "and one for values, like q8_0/q4_0; or auto: f16, or a smaller type if the budget is "
            "memory, as more tokens then fit",
            metavar="TYPE",
            session="settled",
        ),
    )
    n_ctx: int | None = field(
        default=None,
        metadata=_about(
            "logical context: the longest conversation, in tokens; costs almost no memory",
            means="the model's trained length, which 0 means, too",
            metavar="N",
            session="any",
        ),
    )
    policy: str | Policy = field(
        default="auto",
        metadata=_about(
            f"{', '.join(POLICIES)}; a policy file; in Python a Policy object; or auto: the "
            "policy trained for the model (kvp-*.gguf beside it, or shipped) if there is one, "
            f"otherwise {FALLBACK}",
            metavar="NAME",
            session="settled",
        ),
    )
    granularity: str = field(
        default="head",
        metadata=_about(
            "head: every attention head keeps its own tokens; token: a token is dropped from "
            "all layers and heads at once; auto: head where possible, otherwise token",
            choices=("head", "token", "auto"),
            metavar="WHO",
            session="settled",
            evaluated=True,
        ),
    )
    positions: str = field(
        default="keep",
        metadata=_about(
            "keep: a token keeps its position; compact: kept tokens move to the front before "
            "positions exceed the trained length, so a conversation may be longer: raise n_ctx",
            choices=("keep", "compact"),
            metavar="HOW",
            session="asked",
        ),
    )
    keep_whole: str = field(
        default="tokens",
        metadata=_about(
            "what is kept or dropped as a whole, besides markers of the chat template: "
            "words, sentences, or tokens (nothing more)",
            choices=KEEP_WHOLE,
            metavar="WHAT",
            session="asked",
            evaluated=True,
        ),
    )
    isolate_turns: bool = field(
        default=False,
        metadata=_about(
            "do not drop more of finished messages, as long as a quarter of the room is left "
            "for new ones",
            session="asked",
            evaluated=True,
        ),
    )
    sinks: int = field(
        default=DEFAULT_SINKS,
        metadata=_about("first tokens that are never dropped", metavar="N", session="settled"),
    )
    recent: int | None = field(
        default=None,
        metadata=_about(
            "newest tokens that are never dropped",
            means="a quarter of the budget, at most 256",
            metavar="N",
            session="settled",
        ),
    )
    reserve: int | None = field(
        default=None,
        metadata=_about(
            "free cells after an eviction; more where a sliding window needs them",
            means=(
                "a quarter of the budget, at least 256; a fifth of the cells if the budget is "
                "memory"
            ),
            metavar="N",
            session="settled",
        ),
    )
    protect_system: bool = field(
        default=False,
        metadata=_about(
            "never drop the system prompt of a chat, nor the definitions of tools if they fit too",
            command_line=False,  # there it is the default: --no-protect-system
            session="any",
        ),
    )
    on_evict: Callable[[Eviction], None] | None = field(
        default=None,
        metadata=_about(
            "called with an Eviction after each eviction: what stays, and which tokens no "
            "head has any more",
            means="nothing",
            command_line=False,
            session="any",
        ),
    )
    pack: str = field(
        default="auto",
        metadata=_about(
            "device: score and pack the cache in place, on a GPU too; state: copy it through "
            "llama.cpp's state; auto: in place where possible",
            choices=("auto", "device", "state"),
            metavar="WHERE",
            session="any",
        ),
    )
    recall: str = field(
        default="auto",
        metadata=_about(
            "bring dropped tokens back when a prompt asks for them: reply: before every reply; "
            "always: while it is written, too; off: what is dropped is gone; auto: reply where the "
            "model allows it",
            choices=("auto", "reply", "always", "off"),
            metavar="WHEN",
            session="any",
            evaluated=False,
        ),
    )
    recall_every: int = field(
        default=64,
        metadata=_about(
            "with recall=always: tokens written between two recalls, at most",
            metavar="N",
            session="any",
        ),
    )
    kv_log: str | None = field(
        default=None,
        metadata=_about(
            "file for the keys and values of all tokens that were dropped, for recall",
            means="in memory",
            metavar="FILE",
            session="any",
        ),
    )
    kv_log_limit: str = field(
        default="2GiB",
        metadata=_about(
            "memory that these keys and values may take; past it the oldest are lost",
            metavar="SIZE",
            session="any",
        ),
    )
    kv_log_type: str = field(
        default="cache",
        metadata=_about(
            "type of these keys and values: cache, the cache's own, or a smaller one, like q8_0",
            choices=("cache", *CACHE_TYPES),
            metavar="TYPE",
            session="any",
        ),
    )
    on_recall: Callable[[Recall], None] | None = field(
        default=None,
        metadata=_about(
            "called with a Recall after each of them: which tokens came back",
            means="nothing",
            command_line=False,
            session="any",
        ),
    )
    special_in_messages: bool = field(
        default=False,
        metadata=_about(
            "text in messages that spells a special token becomes that token, as in llama_cpp: "
            "only for messages that you trust",
            session="any",
        ),
    )
    repack: str = field(
        default="auto",
        metadata=_about(
            "repack weights on the CPU for speed: on, off, or auto: if a trial in a child "
            "process succeeds (see kvp-edge doctor)",
            choices=REPACK,
            metavar="WHEN",
            session="any",
        ),
    )
    n_batch: int | None = field(
        default=None,
        metadata=_about(
            "most tokens decoded at once",
            means="512, or what fits into the reserve and beside a sliding window",
            metavar="N",
            command_line=False,
            session="settled",
        ),
    )

    def __post_init__(self) -> None:
        for option in OPTIONS.values():
            value = getattr(self, option.name)
            if option.choices and value not in option.choices:
                *others, last = map(repr, option.choices)
                raise OptionError(
                    f"{option.name} must be {', '.join(others)} or {last}, not '{value}'"
                )
        counts = ("n_ctx", "kv_budget", "sinks", "recent", "reserve", "n_batch")
        # a budget may be memory, "256MiB", too
        numbers = {name: getattr(self, name) for name in counts}
        if isinstance(self.kv_budget, str):
            del numbers["kv_budget"]
        check_counts(**numbers)
        check_counts(recall_every=self.recall_every)
        if self.recall_every < 1:
            raise BudgetError(f"recall_every must be at least 1 token, not {self.recall_every}")
        memory_bytes("kv_log_limit", self.kv_log_limit)
        if self.kv_log is not None and self.recall == "off":
            raise OptionError(
                f"kv_log='{self.kv_log}' is for what recall brings back, and recall='off' brings "
                "nothing back: leave one of them out"
            )
        if self.kv_type != "auto":
            KVTypes.parse("kv_type", self.kv_type, also="auto, ")
        check_callable(on_evict=self.on_evict, on_recall=self.on_recall)

    @property
    def bounded(self) -> bool:
        return self.kv_budget is not None

    @classmethod
    def among(cls, arguments: Mapping[str, Any]) -> CacheOptions:
        """Those of the arguments that are options."""
        return cls(**{name: arguments[name] for name in OPTIONS if name in arguments})

    def asked(self) -> dict[str, Any]:
        """All options, as they were given."""
        return {name: getattr(self, name) for name in OPTIONS}

    def asked_of_sessions(self) -> dict[str, Any]:
        """Those whose value decides how a saved session continues."""
        return {o.name: getattr(self, o.name) for o in OPTIONS.values() if o.session == "asked"}


@dataclass(frozen=True)
class Option:
    """A field of CacheOptions, described.

    Attributes:
        name: of ``Llama``'s argument.
        type: its annotation, like "int | None".
        default: see ``default_text``, too.
        help: what it means, in words for README and ``--help``.
        choices: all it may be; (): anything of its type.
        means: what a default of None stands for.
        metavar: stands for the value in ``--help``; "" of a switch.
        command_line: whether it is an option of ``kvp-edge chat`` and ``run``.
        evaluated: whether evaluations compare its values: then it is a field of
            evaluation.setting.Setting, evaluation.records.Record and evaluation.grouping.Setting,
            and an option of ``kvp-edge eval``.
        session: see Session.
    """

    name: str
    type: str
    default: Any
    help: str
    choices: tuple[str, ...]
    means: str
    metavar: str
    command_line: bool
    evaluated: bool
    session: Session

    @property
    def flag(self) -> str:
        """Its name on the command line."""
        return "--" + self.name.replace("_", "-")

    @property
    def default_text(self) -> str:
        """The default in words."""
        return self.means or str(self.default)


#: Every option by its name, in the order of ``Llama``'s signature.
OPTIONS: Mapping[str, Option] = MappingProxyType(
    {f.name: Option(f.name, str(f.type), f.default, **f.metadata) for f in fields(CacheOptions)}
)

#: Those that evaluations compare.
EVALUATED = tuple(option.name for option in OPTIONS.values() if option.evaluated)


def _described(option: Option) -> str:
    text = f"{option.name}: {option.help} (default: {option.default_text})."
    return textwrap.fill(text, 96, initial_indent=" " * 8, subsequent_indent=" " * 12)


# help(CacheOptions) tells what the fields mean, from the fields
CacheOptions.__doc__ = (CacheOptions.__doc__ or "").replace(
    "\n    Raises:",
    "\n    Args:\n" + "\n".join(map(_described, OPTIONS.values())) + "\n\n    Raises:",
)
