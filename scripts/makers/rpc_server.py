"""Lends this process's CPU through llama.cpp's RPC backend until its standard input closes.

    python rpc_server.py LIBLLAMA HOST:PORT

It loads llama.cpp's library only, none of Python's packages, so that it is there at once.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading

_THREADS = 1


def serve(library: str, endpoint: str) -> None:
    """Returns only if it cannot listen there; what was wrong is on standard error."""
    lib = ctypes.CDLL(library)  # finds the symbols of the ggml libraries that it was linked with
    lib.ggml_backend_cpu_reg.restype = ctypes.c_void_p
    lib.ggml_backend_reg_dev_get.restype = ctypes.c_void_p
    lib.ggml_backend_reg_dev_get.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    start = lib.ggml_backend_rpc_start_server
    start.restype = None
    start.argtypes = [
        ctypes.c_char_p,
        ctypes.c_char_p,
        ctypes.c_size_t,
        ctypes.c_size_t,
        ctypes.POINTER(ctypes.c_void_p),
    ]
    cpu = lib.ggml_backend_reg_dev_get(lib.ggml_backend_cpu_reg(), 0)
    start(endpoint.encode(), None, _THREADS, 1, (ctypes.c_void_p * 1)(cpu))


def _end_with_parent() -> None:
    os.read(0, 1)  # nothing is ever written: it returns when the writing end is closed
    os._exit(0)


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, daemon=True).start()
    serve(sys.argv[1], sys.argv[2])
    sys.exit(1)
