"""The types that the keys and values of a cache can have.

A type that ggml gains needs a name here, a row in ``can_be_written``
(native/state/convert.cpp) if ggml can quantise to it, and tests (tests/support/cache_types.py).
All else follows from ggml.
"""

from __future__ import annotations

from dataclasses import dataclass

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from kvp_edge.errors import OptionError

#: What users call them, most exact first: --type-k, --type-v.
CACHE_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")

#: Numbers that are stored as they are, not in quantised blocks.
PLAIN_TYPES = (GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16)


def ggml_type(name: str) -> int:
    """The number in enum ggml_type of a name in ``CACHE_TYPES``."""
    return int(GGMLQuantizationType[name.upper()])


def type_name(number: int) -> str:
    """What a number in enum ggml_type is called; the number itself if it has no name."""
    try:
        return str(GGMLQuantizationType(number).name).lower()
    except ValueError:
        return str(number)


@dataclass(frozen=True)
class KVTypes:
    """The types of a cache's keys and values, as numbers in enum ggml_type. ``str`` is what
    ``parse`` reads: one name if they are equal, otherwise two with a slash."""

    keys: int
    values: int

    @classmethod
    def parse(cls, name: str, text: object, *, also: str = "") -> KVTypes:
        """What "q8_0" (keys and values) or "q8_0/q4_0" (keys, values) stands for.

        Args:
            name: of what says so, for the error.
            also: what else it may be, for the error.

        Raises:
            OptionError: a name that is not in ``CACHE_TYPES``.
        """
        keys, slash, values = str(text).partition("/")
        for one in (keys, values) if slash else (keys,):
            if one not in CACHE_TYPES:
                raise OptionError(
                    f"{name} must be {also}a type ({', '.join(CACHE_TYPES)}), or one for keys and "
                    f"one for values like q8_0/q4_0, not '{text}'"
                )
        return cls(ggml_type(keys), ggml_type(values if slash else keys))

    def __str__(self) -> str:
        names = type_name(self.keys), type_name(self.values)
        return names[0] if self.keys == self.values else "/".join(names)

    @property
    def quantised_keys(self) -> bool:
        return self.keys not in PLAIN_TYPES

    @property
    def quantised_values(self) -> bool:
        return self.values not in PLAIN_TYPES


F16 = KVTypes(GGMLQuantizationType.F16, GGMLQuantizationType.F16)


def bytes_of(number: int, n: int) -> int | None:
    """Bytes of ``n`` values of a ggml type; None: they are no whole blocks."""
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType(number)]
    return None if n % block else n // block * size
