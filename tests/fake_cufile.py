"""The fake libcufile (native/fake_cufile) as Python tests use it, under the real bindings.

It lies beside the fake libcuda, and both keep one state a process. What the settings mean is in
native/fake_cufile/fake_cufile.h.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from ctypes import c_char_p, c_int, c_longlong, c_uint64
from pathlib import Path

import pytest

import fake_cuda
import gpunvme
from files import MIB

COMPAT, NVIDIA_FS, P2PDMA = "cufile/compat", "cufile/nvidia-fs", "cufile/p2pdma"


class FakeCufile:
    """The library and its controls."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.lib = ctypes.CDLL(path)
        self.lib.fake_cufile_set.argtypes = [c_char_p, c_longlong]
        self.lib.fake_cufile_set.restype = c_int
        self.lib.fake_cufile_fail.argtypes = [c_char_p, c_uint64, c_longlong]
        self.lib.fake_cufile_calls.argtypes = self.lib.fake_cufile_counter.argtypes = [c_char_p]
        self.lib.fake_cufile_calls.restype = self.lib.fake_cufile_counter.restype = c_uint64

    def set(self, **settings: int) -> None:
        for name, value in settings.items():
            self.lib.fake_cufile_set(name.encode(), value)

    def fail(self, function: str, code: int, k: int = 1) -> None:
        """The k-th next call fails."""
        self.lib.fake_cufile_fail(function.encode(), k, code)

    def calls(self, function: str) -> int:
        return int(self.lib.fake_cufile_calls(function.encode()))

    def count(self, name: str) -> int:
        return int(self.lib.fake_cufile_counter(name.encode()))

    def reset(self) -> None:
        """Settings, failures and counters as at the start; what is registered stays."""
        self.lib.fake_cufile_reset()


def why_not() -> str:
    """Why the fake cannot be used here; "" if it can."""
    if importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.bindings") is None:
        return "the bindings of cuFile are not installed: pip install cuda-bindings"
    return "" if library() else "no libcufile for tests: run `make native-plain`"


def library(name: str = "libcufile_fake.so") -> str | None:
    """Where the library for tests is."""
    cuda = os.environ.get("GPUNVME_FAKE_LIBCUDA")
    path = Path(cuda).parent / name if cuda else None
    return str(path) if path is not None and path.is_file() else None


def environment(name: str = "libcufile_fake.so") -> dict[str, str]:
    """What a program's environment must have, to use it."""
    if reason := why_not():
        pytest.skip(reason)
    return {"GPUNVME_LIBCUDA": os.environ["GPUNVME_FAKE_LIBCUDA"], "GPUNVME_LIBCUFILE": library(name) or ""}


_loaded: FakeCufile | None = None


def use() -> tuple[fake_cuda.FakeCuda, FakeCufile]:
    """Make the fakes the libcuda and libcufile of this process; before anything in it has used either."""
    global _loaded
    os.environ.update(environment())
    cuda = fake_cuda.use()
    if _loaded is None:
        _loaded = FakeCufile(os.environ["GPUNVME_LIBCUFILE"])
    _loaded.reset()
    return cuda, _loaded


def read(cuda: fake_cuda.FakeCuda, place: Path, path: str, nbytes: int = 3 * MIB, offset: int = 0) -> gpunvme.Transfer:
    """Read a range into GPU memory by a path."""
    with gpunvme.open(place, path=path) as opened, cuda.alloc(nbytes) as buffer:
        return opened.read_into(buffer, offset)
