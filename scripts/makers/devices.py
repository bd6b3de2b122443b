"""Devices whose memory the host cannot touch: a GPU, or without one llama.cpp's RPC backend.

A server in another process on this machine lends its CPU (ggml/src/ggml-rpc/ggml-rpc.cpp); here it
is a device like any other, and what lies on it is reached by copies and by graphs that run there.
Its arithmetic is that of the CPU backend, so logits of f32 weights are the same to the last bit;
those of other weights where llama.cpp does not repack them for its own CPU (use_extra_bufts).

llama.cpp ends the process, rather than report an error, when a server it uses is gone: servers live
as long as the process that started them, and a test that kills one runs in a process of its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import pytest
from llama_cpp import llama_cpp as bindings

_HOST = "127.0.0.1"
_SERVER = Path(__file__).with_name("rpc_server.py")
_PATIENCE = 60.0
"""Seconds that a server may take to answer; a slow machine needs one."""

_load = bindings.llama_model_load_from_file

_GPUS = (1, 2)
"""GGML_BACKEND_DEVICE_TYPE_GPU and ..._IGPU of ggml-backend.h."""


@functools.cache
def gpu_device() -> int | None:
    """The ggml_backend_dev_t of the first GPU in llama.cpp's list, None without one.

    RPC devices are not in it (`rpc_device`). A Vulkan device that is a CPU, as Mesa's llvmpipe is,
    is in it only where GGML_VK_VISIBLE_DEVICES names it by its number (ggml_vk_instance_init in
    ggml/src/ggml-vulkan/ggml-vulkan.cpp).
    """
    lib = bindings._lib
    lib.ggml_backend_dev_count.restype = ctypes.c_size_t
    lib.ggml_backend_dev_get.restype = ctypes.c_void_p
    lib.ggml_backend_dev_get.argtypes = [ctypes.c_size_t]
    lib.ggml_backend_dev_type.restype = ctypes.c_int
    lib.ggml_backend_dev_type.argtypes = [ctypes.c_void_p]
    for i in range(lib.ggml_backend_dev_count()):
        device: int = lib.ggml_backend_dev_get(i)
        if lib.ggml_backend_dev_type(device) in _GPUS:
            return device
    return None


def rpc_supported() -> bool:
    """Whether the llama.cpp installed was compiled with -DGGML_RPC=ON."""
    return bool(llama_cpp.llama_supports_rpc())


class RpcServer:
    """A server on a free port of this machine; runs until `kill` or the end of this process.

    It serves one connection at a time, and a process has one per endpoint: a second process, or the
    same one through another endpoint (`CountingProxy`), waits until the first has freed all that it
    has on it.
    """

    def __init__(self) -> None:
        port = _free_port()
        self.endpoint = f"{_HOST}:{port}"
        # The server watches the reading end. The writing end is a bare number, which no garbage
        # collector closes: it closes with this process, however that ends.
        lifeline, self._lifeline = os.pipe()
        with tempfile.TemporaryFile() as messages:
            self._process = subprocess.Popen(
                [sys.executable, _SERVER, bindings._lib._name, self.endpoint],
                stdin=lifeline,
                stdout=subprocess.DEVNULL,
                stderr=messages,
                start_new_session=True,  # Ctrl-C is for the tests
            )
            os.close(lifeline)
            try:
                self._wait(port)
            except RuntimeError as error:
                self.kill()
                messages.seek(0)
                raise RuntimeError(f"{error}:\n{messages.read().decode()}") from None

    def _wait(self, port: int) -> None:
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                socket.create_connection((_HOST, port)).close()
                return
            except ConnectionRefusedError:
                pass
            status = self._process.poll()
            if status is not None:
                raise RuntimeError(f"the RPC server at {self.endpoint} ended with {status}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"no RPC server at {self.endpoint} after {_PATIENCE} s")
            time.sleep(0.01)

    def kill(self) -> None:
        """End it at once; a process that has anything on it ends at its next call to it."""
        self._process.kill()
        self._process.wait()
        if self._lifeline >= 0:
            os.close(self._lifeline)
            self._lifeline = -1


def rpc_device(endpoint: str) -> int:
    """The ggml_backend_dev_t of a server. llama.cpp's list of devices is left as it is: no other
    model goes there by itself."""
    # symbols of the ggml libraries that libllama was loaded with: the wheel has two copies
    lib = bindings._lib
    lib.ggml_backend_rpc_add_server.restype = ctypes.c_void_p
    lib.ggml_backend_rpc_add_server.argtypes = [ctypes.c_char_p]
    lib.ggml_backend_reg_dev_get.restype = ctypes.c_void_p
    lib.ggml_backend_reg_dev_get.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    registry = lib.ggml_backend_rpc_add_server(endpoint.encode())
    if not registry:
        raise RuntimeError(f"the RPC server at {endpoint} lends no device")
    device: int = lib.ggml_backend_reg_dev_get(registry, 0)
    return device


@contextlib.contextmanager
def placed(devices: Sequence[int]) -> Iterator[None]:
    """Models that llama_cpp.Llama loads inside lie wholly on these devices, whatever n_gpu_layers
    says; on the CPU if there are none. Their layers are split among several devices: the first gets
    at least one of two layers, the last the output layer as well. The innermost of several holds.
    """
    listed = (ctypes.c_void_p * (len(devices) + 1))(*devices, None)
    shares = (ctypes.c_float * bindings.LLAMA_MAX_DEVICES)()
    # a share is of all layers and the output layer, in order: llama_model::load_tensors
    shares[: len(devices)] = [3.0] * (len(devices) - 1) + [7.0] * bool(devices)

    def load_here(path: bytes, params: Any) -> Any:
        params.devices = ctypes.addressof(listed)
        params.n_gpu_layers = 2**31 - 1 if devices else 0
        params.tensor_split = shares
        return _load(path, params)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bindings, "llama_model_load_from_file", load_here)
        yield


class CountingProxy:
    """Stands between llama.cpp and a server and counts what passes, in bytes.

    Connect to the server through it only (see `RpcServer`). It lives as long as the process.
    """

    def __init__(self, endpoint: str) -> None:
        host, port = endpoint.split(":")
        self._server = (host, int(port))
        self._passed = {"to_device": 0, "to_host": 0}
        self._listener = socket.create_server((_HOST, 0))
        self.endpoint = f"{_HOST}:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()
        self.device = rpc_device(self.endpoint)

    @property
    def to_device(self) -> int:
        """Bytes since the last reset from here to the device, with those of the messages."""
        self._settle()
        return self._passed["to_device"]

    @property
    def to_host(self) -> int:
        """Bytes since the last reset from the device to here, with those of the messages."""
        self._settle()
        return self._passed["to_host"]

    def reset(self) -> None:
        self._settle()
        self._passed.update(to_device=0, to_host=0)

    def _settle(self) -> None:
        """Ask the device how much memory it has. Most messages are not answered, so they may be on
        their way still; this one is, and comes after them. It adds less than 50 bytes."""
        memory = bindings._lib.ggml_backend_dev_memory
        memory.restype = None
        memory.argtypes = [ctypes.c_void_p, *[ctypes.POINTER(ctypes.c_size_t)] * 2]
        memory(self.device, ctypes.c_size_t(), ctypes.c_size_t())

    def _accept(self) -> None:
        while True:
            near, _ = self._listener.accept()
            far = socket.create_connection(self._server)
            threading.Thread(target=self._connect, args=(near, far), daemon=True).start()

    def _connect(self, near: socket.socket, far: socket.socket) -> None:
        with near, far:
            for end in (near, far):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            back = threading.Thread(target=self._pass_on, args=(far, near, "to_host"), daemon=True)
            back.start()
            self._pass_on(near, far, "to_device")
            back.join()

    def _pass_on(self, source: socket.socket, target: socket.socket, way: str) -> None:
        with contextlib.suppress(OSError):  # an end that is gone ends the other
            while data := source.recv(1 << 20):
                self._passed[way] += len(data)
                target.sendall(data)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)


def _free_port() -> int:
    with socket.create_server((_HOST, 0)) as probe:
        port: int = probe.getsockname()[1]
    return port
