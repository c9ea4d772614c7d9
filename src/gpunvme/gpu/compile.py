"""Kernels: those that come with gpunvme, and a user's own against the same headers.

Ours are compiled when the package is built, where nvcc is at hand. Otherwise, and for a user's, NVRTC compiles, which
needs libnvrtc and libcu++'s headers: a CUDA toolkit, or ``pip install gpunvme[cuda]``. Its results are kept on disk.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import gpunvme
from gpunvme.errors import CudaError, SpanError
from gpunvme.gpu.driver import Gpu
from gpunvme.kept_files import cache_directory
from gpunvme.memory import Device, span_of
from gpunvme.streams import stream_handle

_KERNELS = Path(__file__).parent / "kernels"
_SHIPPED = "kernels.fatbin"
_NVRTC_MAJORS = (13, 12)

# NVRTC has no C++ library; libcu++ has what our headers need of one. offsetof as NVRTC's own front end understands it
# in constant expressions.
_STANDARD = {
    "cstddef": """#pragma once
#include <cuda/std/cstddef>
#undef offsetof
#define offsetof(type, member) (__INTADDR__(&(((type*)0)->member)))
namespace std { using cuda::std::nullptr_t; using cuda::std::ptrdiff_t; using cuda::std::size_t; }
""",
    "cstdint": """#pragma once
#include <cuda/std/cstdint>
namespace std {
using cuda::std::int16_t; using cuda::std::int32_t; using cuda::std::int64_t; using cuda::std::int8_t;
using cuda::std::intptr_t; using cuda::std::uint16_t; using cuda::std::uint32_t; using cuda::std::uint64_t;
using cuda::std::uint8_t; using cuda::std::uintptr_t;
}
""",
}


def include_directory() -> Path:
    """Directory of ``gpunvme/device.h`` and its like, for any compiler's ``-I``.

    Raises
    ------
    CudaError
        If the package was installed without them.
    """
    places = [Path(each) / "include" for each in gpunvme.__path__]
    places.append(Path(__file__).parents[3] / "native" / "include")  # in a source tree
    for place in places:
        if (place / "gpunvme" / "device.h").is_file():
            return place
    raise CudaError(f"gpunvme/device.h is not in {', '.join(map(str, places))}: install gpunvme again")


def _roots() -> Iterator[Path]:
    """Where CUDA may be: what the environment says, wheels, the usual places."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            yield Path(os.environ[variable])
    for entry in sys.path:
        nvidia = Path(entry) / "nvidia"
        if nvidia.is_dir():
            yield from (nvidia / name for name in ("cu13", "cuda_nvrtc", "cuda_cccl", "cuda_runtime"))
    yield from (Path("/usr/local/cuda"), Path("/opt/cuda"))


def cccl_directory() -> Path:
    """Directory of libcu++'s ``cuda/atomic``.

    Raises
    ------
    CudaError
        If it is nowhere to be found.
    """
    for root in _roots():
        for place in (root / "include" / "cccl", root / "include"):
            if (place / "cuda" / "atomic").is_file():
                return place
    raise CudaError("libcu++ (cuda/atomic) was not found: pip install nvidia-cuda-cccl, or set CUDA_HOME to a toolkit")


@functools.cache
def _nvrtc() -> ctypes.CDLL:
    places: list[str] = []
    for major in _NVRTC_MAJORS:
        name = f"libnvrtc.so.{major}"
        found = (root / each / name for root in _roots() for each in ("lib", "lib64"))
        places += [str(path) for path in found if path.is_file()] + [name]
    for place in places:
        try:
            # NVRTC looks for these by name only, which finds no wheel's.
            for builtins in Path(place).parent.glob("libnvrtc-builtins.so*") if "/" in place else ():
                ctypes.CDLL(str(builtins))
            library = ctypes.CDLL(place)
        except OSError:
            continue
        library.nvrtcGetErrorString.restype = c_char_p
        library.nvrtcCreateProgram.argtypes = (
            *(POINTER(c_void_p), c_char_p, c_char_p, c_int),
            *(POINTER(c_char_p), POINTER(c_char_p)),
        )
        library.nvrtcCompileProgram.argtypes = (c_void_p, c_int, POINTER(c_char_p))
        for what in ("ProgramLog", "CUBIN"):
            getattr(library, f"nvrtcGet{what}Size").argtypes = (c_void_p, POINTER(c_size_t))
            getattr(library, f"nvrtcGet{what}").argtypes = (c_void_p, c_char_p)
        library.nvrtcDestroyProgram.argtypes = (POINTER(c_void_p),)
        library.nvrtcVersion.argtypes = (POINTER(c_int), POINTER(c_int))
        return library
    raise CudaError("NVRTC was not found: pip install nvidia-cuda-nvrtc, or install a CUDA toolkit")


def _answer(function: str, program: c_void_p) -> bytes:
    size = c_size_t()
    getattr(_nvrtc(), function + "Size")(program, byref(size))
    text = ctypes.create_string_buffer(max(1, size.value))
    getattr(_nvrtc(), function)(program, text)
    return text.raw[: size.value]


def _strings(texts: Sequence[str]) -> Any:
    return (c_char_p * max(1, len(texts)))(*(text.encode() for text in texts))


def compile_to_cubin(source: str, capability: tuple[int, int], options: Sequence[str] = (), name: str = "") -> bytes:
    """Compile CUDA C++ for one compute capability, with our headers and libcu++ on the include path.

    Parameters
    ----------
    source
        The program; ``#include <gpunvme/device.h>`` works.
    capability
        Such as ``(9, 0)``.
    options
        More options for NVRTC.
    name
        What messages call it.

    Raises
    ------
    CudaError
        If it does not compile, with the compiler's messages, or NVRTC or libcu++ are missing.
    """
    library = _nvrtc()
    program = c_void_p()
    headers = _strings(list(_STANDARD.values())), _strings(list(_STANDARD))
    library.nvrtcCreateProgram(byref(program), source.encode(), name.encode(), len(_STANDARD), *headers)
    try:
        every = _options(capability, options)
        result = library.nvrtcCompileProgram(program, len(every), _strings(every))
        if result:
            log = _answer("nvrtcGetProgramLog", program).rstrip(b"\0 \n").decode(errors="replace")
            why = library.nvrtcGetErrorString(result).decode()
            raise CudaError(f"{name or 'the kernel'} does not compile: {why}\n{log}")
        return _answer("nvrtcGetCUBIN", program)
    finally:
        library.nvrtcDestroyProgram(byref(program))


def _options(capability: tuple[int, int], options: Sequence[str]) -> list[str]:
    return [
        "--std=c++17",
        f"--gpu-architecture=sm_{capability[0]}{capability[1]}",
        f"-I{include_directory()}",
        f"-I{_KERNELS}",
        f"-I{cccl_directory()}",
        *options,
    ]


# --- what was compiled before


def cubin_directory() -> Path:
    """Directory of what NVRTC has compiled."""
    return cache_directory() / "kernels"


def _nvrtc_version() -> tuple[int, int]:
    major, minor = c_int(), c_int()
    _nvrtc().nvrtcVersion(byref(major), byref(minor))
    return major.value, minor.value


def _fingerprint(source: str, capability: tuple[int, int], options: Sequence[str]) -> str:
    what = hashlib.sha256(repr((source, capability, tuple(options), _nvrtc_version())).encode())
    ours = [*include_directory().glob("gpunvme/*.h"), *_KERNELS.glob("*.cu*")]
    for header in sorted(ours):
        what.update(header.name.encode() + b"\0" + header.read_bytes())
    return what.hexdigest()[:32]


def _compiled(source: str, capability: tuple[int, int], options: Sequence[str], name: str) -> bytes:
    """As `compile_to_cubin`, from the cache on disk where it is there."""
    # An include of the user's own may change without our knowing.
    if any(option.startswith(("-I", "--include-path", "-include", "--pre-include")) for option in options):
        return compile_to_cubin(source, capability, options, name)
    place = cubin_directory() / f"{_fingerprint(source, capability, options)}.cubin"
    try:
        return place.read_bytes()
    except OSError:
        image = compile_to_cubin(source, capability, options, name)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=place.parent, delete=False) as file:
            file.write(image)
        Path(file.name).replace(place)  # whole or not at all, whoever else writes it
    except OSError:
        pass  # a cache that cannot be written costs time and nothing else
    return image


# --- kernels to launch


class Kernel:
    """A kernel that can be launched. Made by `Program.kernel`."""

    def __init__(self, gpu: Gpu, handle: int, name: str) -> None:
        self._gpu = gpu
        self.handle = handle
        self.name = name

    def launch(
        self,
        grid: int | tuple[int, ...],
        block: int | tuple[int, ...],
        *arguments: Any,
        stream: Any = None,
        shared: int = 0,
    ) -> None:
        """Launch it; returns at once.

        Parameters
        ----------
        grid, block
            Blocks, and threads of each: a number, or up to three.
        arguments
            Tensors, arrays and queues of this GPU give their GPU address; an int is 8 bytes, an address of whatever
            else among them; a float is a double; for other types use ctypes or NumPy scalars.
        stream
            As for `File.read_into`.
        shared
            Bytes of dynamic shared memory.

        Raises
        ------
        SpanError
            If an argument or the stream is another GPU's. Where the GPUs reach each other's memory, pass its address.
        """
        device = Device("cuda", self._gpu.index)
        queue = stream_handle(stream, None, device) or 0
        packed = [_argument(each, device) for each in arguments]
        self._gpu.launch(self.handle, _three(grid), _three(block), packed, queue, shared)


def _three(size: int | tuple[int, ...]) -> tuple[int, int, int]:
    sizes = (size,) if isinstance(size, int) else tuple(size)
    x, y, z = (*sizes, 1, 1, 1)[:3]
    return x, y, z


def _argument(value: Any, device: Device) -> Any:
    if isinstance(value, (ctypes._SimpleCData, ctypes.Structure, ctypes.Array)):
        return value
    if hasattr(value, "dtype") and getattr(value, "shape", None) == () and hasattr(value, "tobytes"):
        return ctypes.create_string_buffer(value.tobytes())  # a NumPy scalar
    if isinstance(value, bool):
        return ctypes.c_bool(value)
    if isinstance(value, int):
        return ctypes.c_int64(value) if value < 0 else ctypes.c_uint64(value)
    if isinstance(value, float):
        return ctypes.c_double(value)
    handle = getattr(value, "handle", None)
    if isinstance(handle, int):
        address, where = handle, getattr(value, "device", device)
    else:
        span = span_of(value, writable=False)
        address, where = span.ptr, span.device
    if isinstance(where, Device) and where.is_gpu and where != device:
        raise SpanError(f"{type(value).__name__} is on {where}; the kernel was loaded on {device}")
    return ctypes.c_uint64(address)


class Program:
    """Compiled device code for one GPU.

    Attributes
    ----------
    image
        The cubin, for whatever loads modules: ``cuda.core.ObjectCode.from_cubin(program.image)``, or
        ``cupy.RawModule(path=…)`` with the file that `save` writes.
    """

    def __init__(self, gpu: Gpu, image: bytes) -> None:
        self._gpu = gpu
        self._module = gpu.load(image)
        self.image = image

    def kernel(self, name: str) -> Kernel:
        """A kernel by its name, ``extern "C"``. It is loaded now: launching it loads nothing any more."""
        return Kernel(self._gpu, self._gpu.function(self._module, name), name)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the cubin to a file."""
        Path(path).write_bytes(self.image)


def compile(  # noqa: A001 - gpunvme.gpu.compile is what users write
    source: str, *, device: Any = 0, options: Sequence[str] = (), name: str = "kernel.cu"
) -> Program:
    """Compile a kernel of your own that uses ``gpunvme/device.h``, and load it.

    Parameters
    ----------
    source
        CUDA C++.
    device
        The GPU that it is for.
    options
        More options for NVRTC, such as ``-DROWS=4``.
    name
        What messages call it.

    Raises
    ------
    CudaError
        If it does not compile, or NVRTC, libcu++ or a GPU are missing.
    """
    gpu = Gpu(Device.parse(device).index)
    return Program(gpu, _compiled(source, gpu.capability, options, name))


def shipped_kernels() -> Path | None:
    """Our kernels as nvcc compiled them when the package was built; None if it was not there.

    None, too, in a source tree whose kernels were changed since.
    """
    for place in [Path(each) / "gpu" / _SHIPPED for each in gpunvme.__path__]:
        if place.is_file():
            sources = [*_KERNELS.glob("*.cu*")] if place.parent != _KERNELS.parent else []
            if all(source.stat().st_mtime <= place.stat().st_mtime for source in sources):
                return place
    return None


def why_no_kernels() -> str:
    """Why the kernels that come with the package can be had neither compiled nor by compiling them; "" if they can."""
    if shipped_kernels() is not None:
        return ""
    try:
        _nvrtc()
        cccl_directory()
        include_directory()
    except CudaError as error:
        return f"gpunvme was built without nvcc, and cannot compile its kernels now: {error}"
    return ""


def own_kernels(gpu: Gpu) -> Program:
    """The kernels that come with the package.

    Raises
    ------
    CudaError
        If they were not compiled with the package for this GPU, and cannot be compiled now; says what is missing.
    """
    shipped = shipped_kernels()
    if shipped is not None:
        try:
            return Program(gpu, shipped.read_bytes())
        except CudaError:
            pass  # for none of the GPUs that it was compiled for: compile
    source = (_KERNELS / "all.cu").read_text()
    try:
        return Program(gpu, _compiled(source, gpu.capability, (), "gpunvme's kernels"))
    except CudaError as error:
        if shipped is not None:
            raise
        raise CudaError(f"gpunvme was built without nvcc, and cannot compile its kernels now: {error}") from None
