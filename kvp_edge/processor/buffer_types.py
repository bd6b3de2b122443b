"""Try llama.cpp's buffer types for weights on this processor. Also runs as a script.

On the CPU llama.cpp repacks quantised weights into "extra" buffer types for faster products
("CPU_REPACK", "AMX", ...), by the features that the processor reports. Some virtual machines report
AMX but trap its use, so that the first product ends the process. So products are first computed in
a child process.

This file needs only Python and llama.cpp's library. Its arguments are the library's path and the
names of buffer types to leave out. It writes lines of tab-separated words:

    types  NAME...                the buffer types that there are; "CPU", the plain one, is first
    try    NAME TYPE              before the products with weights of this type
    wrong  NAME TYPE ERROR        they are far from what they should be
    done   NAME TYPE...           all its products returned; the types that it computes with
    end                           nothing was left out
"""

from __future__ import annotations

import ctypes
import os
import random
import sys
from array import array
from collections.abc import Iterator, Sequence
from typing import Any

PLAIN = "CPU"

#: Types that weights are stored in: ggml_type of ggml.h. The gguf package has them, too, but what
#: is run in processes of its own imports nothing. The i-quants that cannot be made without an
#: importance matrix are never repacked.
_WEIGHT_TYPES = {
    "f16": 1,
    "bf16": 30,
    "q4_0": 2,
    "q4_1": 3,
    "q5_0": 6,
    "q5_1": 7,
    "q8_0": 8,
    "q2_K": 10,
    "q3_K": 11,
    "q4_K": 12,
    "q5_K": 13,
    "q6_K": 14,
    "iq4_nl": 20,
    "iq4_xs": 23,
    "mxfp4": 39,
    "q1_0": 41,
}
_F32 = 0

#: A weight matrix of _OUT rows of _IN numbers: whole blocks of every type, and what AMX asks for
#: (ggml/src/ggml-cpu/amx/amx.cpp: 32 rows, 256 numbers).
_IN, _OUT = 512, 64
#: One column runs the kernels for a token, many those for a batch; 33 is no multiple of any tile.
_COLUMNS = (1, 33)

#: Largest mean squared error, as a share of the mean square. Another layout sums in another order,
#: and some round activations differently: 1e-6 and less. Rounding to one bit would be off by 1/4.
_MOST_FROM_PLAIN, _MOST_FROM_FLOATS = 1e-3, 0.5


class _InitParams(ctypes.Structure):
    """struct ggml_init_params"""

    _fields_ = [
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    ]


_P, _I, _N, _S = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_size_t
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "ggml_backend_cpu_reg": (_P, []),
    "ggml_backend_reg_by_name": (_P, [ctypes.c_char_p]),
    "ggml_backend_load_all": (None, []),
    "ggml_backend_reg_dev_get": (_P, [_P, _S]),
    "ggml_backend_reg_get_proc_address": (_P, [_P, ctypes.c_char_p]),
    "ggml_backend_dev_buffer_type": (_P, [_P]),
    "ggml_backend_dev_init": (_P, [_P, ctypes.c_char_p]),
    "ggml_backend_dev_supports_op": (ctypes.c_bool, [_P, _P]),
    "ggml_backend_buft_name": (ctypes.c_char_p, [_P]),
    "ggml_backend_alloc_ctx_tensors_from_buft": (_P, [_P, _P]),
    "ggml_backend_buffer_free": (None, [_P]),
    "ggml_backend_tensor_set": (None, [_P, _P, _S, _S]),
    "ggml_backend_tensor_get": (None, [_P, _P, _S, _S]),
    "ggml_backend_graph_compute": (_I, [_P, _P]),
    "ggml_build_forward_expand": (None, [_P, _P]),
    "ggml_free": (None, [_P]),
    "ggml_init": (_P, [_InitParams]),
    "ggml_mul_mat": (_P, [_P, _P, _P]),
    "ggml_nbytes": (_S, [_P]),
    "ggml_new_graph": (_P, [_P]),
    "ggml_new_tensor_2d": (_P, [_P, _I, _N, _N]),
    "ggml_quantize_chunk": (_S, [_I, _P, _P, _N, _N, _N, _P]),
}


class _Ggml:
    """The ggml that a libllama runs on, by its public functions.

    Attributes:
        device: ggml_backend_dev_t of the CPU.
        types: name -> ggml_backend_buffer_type_t, the plain one first.
    """

    def __init__(self, library: str) -> None:
        folder = os.path.dirname(os.path.abspath(library))
        self._libraries = [ctypes.CDLL(library)]
        if sys.platform == "win32":  # elsewhere a library shows what it depends on, too
            others = (os.path.join(folder, f"{n}.dll") for n in ("ggml", "ggml-base", "ggml-cpu"))
            self._libraries += [ctypes.CDLL(path) for path in others if os.path.exists(path)]
        try:
            self._cpu = self["ggml_backend_cpu_reg"]()
        except AttributeError:  # compiled with GGML_BACKEND_DL: the CPU is a plugin, too
            self["ggml_backend_load_all"]()
            self._cpu = self["ggml_backend_reg_by_name"](b"CPU")
        if not self._cpu:
            raise OSError("llama.cpp has no CPU backend")
        self.device = self["ggml_backend_reg_dev_get"](self._cpu, 0)
        self.types = {PLAIN: self["ggml_backend_dev_buffer_type"](self.device)}
        get_extra = self._own("ggml_backend_dev_get_extra_bufts", ctypes.POINTER(_P), _P)
        extra = get_extra(self.device) if get_extra else None
        i = 0
        while extra and extra[i]:
            self.types[self["ggml_backend_buft_name"](extra[i]).decode()] = extra[i]
            i += 1

    def __getitem__(self, name: str) -> ctypes._NamedFuncPointer:
        for library in self._libraries:
            try:
                function = library[name]
            except AttributeError:
                continue
            function.restype, function.argtypes = _SIGNATURES[name]
            return function
        raise AttributeError(f"llama.cpp has no function {name}")

    def _own(self, name: str, restype: type | None, *argtypes: type) -> ctypes._FuncPointer | None:
        """A function that only the CPU backend has."""
        address = self["ggml_backend_reg_get_proc_address"](self._cpu, name.encode())
        return ctypes.CFUNCTYPE(restype, *argtypes)(address) if address else None

    def backend(self) -> int:
        """ggml_backend_t of the CPU, on one thread: no pool of threads is started."""
        made: int = self["ggml_backend_dev_init"](self.device, None)
        set_threads = self._own("ggml_backend_set_n_threads", None, _P, _I)
        if set_threads:
            set_threads(made, 1)
        return made


def extra_buffer_types(library: str) -> list[str]:
    """Names of the extra buffer types that this llama.cpp has for this processor. No product is
    computed.

    Raises:
        OSError: it is no llama.cpp.
    """
    return [name for name in _Ggml(library).types if name != PLAIN]


class _Products:
    """Products of one random matrix, stored in different ways, and random columns."""

    def __init__(self, ggml: _Ggml) -> None:
        self._ggml = ggml
        self._backend = ggml.backend()
        rng = random.Random(1)
        self._weights = array("f", (rng.uniform(-1, 1) for _ in range(_IN * _OUT)))
        self._columns = array("f", (rng.uniform(-1, 1) for _ in range(_IN * max(_COLUMNS))))

    def product(self, weight_type: int, buffer_type: int, n: int) -> array[float] | None:
        """f32 [n, _OUT]; None where this buffer type does not compute with these weights."""
        g = self._ggml
        room = _InitParams(1 << 20, None, True)
        of_weights, of_rest = g["ggml_init"](room), g["ggml_init"](room)
        buffers = []
        try:
            w = g["ggml_new_tensor_2d"](of_weights, weight_type, _IN, _OUT)
            buffers.append(g["ggml_backend_alloc_ctx_tensors_from_buft"](of_weights, buffer_type))
            x = g["ggml_new_tensor_2d"](of_rest, _F32, _IN, n)
            y = g["ggml_mul_mat"](of_rest, w, x)
            graph = g["ggml_new_graph"](of_rest)
            g["ggml_build_forward_expand"](graph, y)
            # first: a buffer type may crash on weights that it does not know
            if not g["ggml_backend_dev_supports_op"](g.device, y):
                return None
            plain = g.types[PLAIN]
            buffers.append(g["ggml_backend_alloc_ctx_tensors_from_buft"](of_rest, plain))
            if not all(buffers):
                raise MemoryError
            stored = ctypes.create_string_buffer(g["ggml_nbytes"](w))
            if weight_type == _F32:
                ctypes.memmove(stored, self._weights.buffer_info()[0], len(stored))
            else:
                floats = self._weights.buffer_info()[0]
                g["ggml_quantize_chunk"](weight_type, floats, stored, 0, _OUT, _IN, None)
            g["ggml_backend_tensor_set"](w, stored, 0, len(stored))
            g["ggml_backend_tensor_set"](x, self._columns.buffer_info()[0], 0, 4 * _IN * n)
            if g["ggml_backend_graph_compute"](self._backend, graph) != 0:
                raise RuntimeError("ggml reports that the product failed")
            result = array("f", bytes(4 * _OUT * n))
            g["ggml_backend_tensor_get"](y, result.buffer_info()[0], 0, 4 * _OUT * n)
            return result
        finally:
            for buffer in buffers:
                g["ggml_backend_buffer_free"](buffer)
            g["ggml_free"](of_rest)
            g["ggml_free"](of_weights)


def _error(found: Sequence[float], expected: Sequence[float]) -> float:
    """Mean squared error over the mean square; infinite if the result is not a number."""
    off = sum((a - b) ** 2 for a, b in zip(found, expected, strict=True))
    error = off / sum(b * b for b in expected)
    return error if error == error else float("inf")  # noqa: PLR0124


def _try(ggml: _Ggml, left_out: Sequence[str]) -> Iterator[Sequence[str]]:
    """The lines of the answer, each written before a step that may end the process."""
    yield ["types", *ggml.types]
    products = None
    for name, buffer_type in ggml.types.items():
        if name in left_out:
            continue
        plain = name == PLAIN
        most = _MOST_FROM_FLOATS if plain else _MOST_FROM_PLAIN
        computed = []
        for type_name, weight_type in _WEIGHT_TYPES.items():
            yield ["try", name, type_name]
            products = products or _Products(ggml)
            worst = 0.0
            for n in _COLUMNS:
                found = products.product(weight_type, buffer_type, n)
                if found is None:
                    break
                reference = _F32 if plain else weight_type
                expected = products.product(reference, ggml.types[PLAIN], n)
                assert expected is not None  # the plain buffer type knows every type
                worst = max(worst, _error(found, expected))
            else:
                computed.append(type_name)
            if worst > most:
                yield ["wrong", name, type_name, f"{worst:.1e}"]
        yield ["done", name, *computed]
    yield ["end"]


def leave_no_traces() -> None:
    """Prevent core files, crash reports and windows: a crash here is an expected answer."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE: nor is a crash handler started
    elif sys.platform == "win32":
        ctypes.windll.kernel32.SetErrorMode(0x0001 | 0x0002)
    else:
        import resource  # noqa: PLC0415

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _main(library: str, *left_out: str) -> None:
    leave_no_traces()
    for line in _try(_Ggml(library), left_out):
        print(*line, sep="\t", flush=True)


if __name__ == "__main__":
    _main(*sys.argv[1:])
