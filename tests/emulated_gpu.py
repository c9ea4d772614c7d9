"""A GPU that is emulated: the package's kernels, and a test's own, run on the CPU as lanes of warps.

For processes that do nothing else: `use` chooses the libcuda of the process, and how kernels are compiled.
"""

from __future__ import annotations

import functools
import importlib
import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import fake_cuda
import gpunvme
from fake_cuda import FakeCuda

_NATIVE = Path(__file__).parent.parent / "native"
_KERNEL = re.compile(r"__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s*)?(\w+)\s*\(")
# As native/CMakeLists.txt compiles the package's.
_OPTIONS = ["-std=c++20", "-O0", "-fno-omit-frame-pointer", "-Wall", "-Wno-unknown-pragmas", "-Wno-unused-function"]


def is_wanted() -> bool:
    """Whether tests for GPUs are to run on the emulated one in this process."""
    return "GPUNVME_FAKE_CUDA_KERNELS" in os.environ


def use() -> FakeCuda:
    """Make the emulated GPU that of this process and of its children's."""
    os.environ["GPUNVME_FAKE_CUDA_KERNELS"] = "1"
    cuda = fake_cuda.use()
    compiling = importlib.import_module("gpunvme.gpu.compile")
    compiling._SHIPPED = Path("/nowhere")  # type: ignore[attr-defined] # whether or not there is nvcc
    compiling._compiled = _compiled  # type: ignore[attr-defined]
    compiling.why_no_kernels = lambda: ""  # type: ignore[attr-defined]
    return cuda


def _compiled(source: str, capability: tuple[int, int], options: Sequence[str], name: str) -> bytes:
    if "gpunvme_gather" in _KERNEL.findall(source) or '"rows.cu"' in source:
        return b"the package's own kernels"
    return library(source, name)


@functools.cache
def library(source: str, name: str = "kernel.cu") -> bytes:
    """A shared library of kernels of a test's own: what a cubin is for a GPU."""
    kernels = ", ".join(f"SIMT_KERNEL({kernel})" for kernel in _KERNEL.findall(source))
    program = f'#include "simt/cuda.h"\nSIMT_KERNELS_BEGIN\n#line 1 "{name}"\n{source}\nSIMT_KERNELS_END({kernels})\n'
    fake = Path(os.environ["GPUNVME_FAKE_LIBCUDA"]).resolve()
    with tempfile.TemporaryDirectory() as directory:
        where, made = Path(directory) / "kernels.cpp", Path(directory) / "kernels.so"
        where.write_text(program)
        command = ["g++", *_OPTIONS, "-fPIC", "-shared", "-fvisibility=hidden", str(where), "-o", str(made)]
        command += [f"-I{_NATIVE / 'fake_cuda'}", f"-I{_NATIVE / 'include'}"]
        command += [f"-L{fake.parent}", f"-l:{fake.name}", f"-Wl,-rpath,{fake.parent}"]
        said = subprocess.run(command, capture_output=True, text=True, check=False)
        if said.returncode:
            raise gpunvme.CudaError(f"{name} does not compile:\n{said.stderr}")
        return made.read_bytes()
