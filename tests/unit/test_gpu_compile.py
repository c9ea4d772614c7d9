"""Compiling device code without a GPU. If this failed, kernels that include our headers would not compile somewhere."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import files
import gpunvme
from gpunvme.gpu import compile as compiling  # the function; its module is below
from gpunvme.gpu import include_directory

module = sys.modules["gpunvme.gpu.compile"]
KERNELS = Path(module.__file__).parent / "kernels"


@functools.cache
def no_nvrtc() -> str:
    try:
        module._nvrtc()
        module.cccl_directory()
    except gpunvme.CudaError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("standard", ["c++17", "c++20"])
def test_the_device_library_is_host_code_too(tmp_path: Path, standard: str) -> None:
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    source = tmp_path / "program.cpp"
    source.write_text(
        "#include <gpunvme/device.h>\n"
        "int use(const gpunvme::GpuQueue& queue, void* data) { return gpunvme::read(queue, 0, 1, data).ok(); }\n"
    )
    command = [compiler, f"-std={standard}", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", f"-I{include_directory()}"]
    done = subprocess.run([*command, str(source)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("header", sorted(path.name for path in include_directory().glob("gpunvme/*.h")))
def test_each_header_stands_alone(tmp_path: Path, header: str) -> None:
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    source = tmp_path / "program.cpp"
    source.write_text(f"#include <gpunvme/{header}>\n")
    done = subprocess.run(
        [compiler, "-std=c++17", "-fsyntax-only", f"-I{include_directory()}", str(source)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_our_kernels_compile_where_the_package_has_none() -> None:
    """Every architecture, nvcc, and the examples: tools/device-code."""
    if no_nvrtc():
        pytest.skip(no_nvrtc())
    image = module.compile_to_cubin((KERNELS / "all.cu").read_text(), (9, 0), (), "all.cu")
    for kernel in ("gather", "scatter", "stream", "set_up", "reap", "cut"):
        assert f"gpunvme_{kernel}".encode() in image


def test_the_package_has_its_kernels_if_there_was_nvcc_when_it_was_built() -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc on PATH: kernels are compiled by NVRTC when they are used")
    shipped = module.shipped_kernels()
    assert shipped is not None
    image = shipped.read_bytes()
    assert image.startswith(b"\x50\xed\x55\xba"), "a fat binary"
    assert module.why_no_kernels() == ""


class Unloadable:
    """A GPU that takes no image, and remembers what it was given."""

    capability = (9, 0)

    def __init__(self) -> None:
        self.given: list[bytes] = []

    def load(self, image: bytes) -> int:
        self.given.append(image)
        if image.startswith(b"for other GPUs"):
            raise gpunvme.CudaError("CUDA_ERROR_NO_BINARY_FOR_GPU")
        return 1


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where the package would have its compiled kernels; everything else is where it was."""
    (tmp_path / "include").symlink_to(module.include_directory())
    monkeypatch.setattr(module.gpunvme, "__path__", [str(tmp_path)])
    (tmp_path / "gpu").mkdir()
    return tmp_path / "gpu" / "kernels.fatbin"


def test_without_nvcc_and_without_nvrtc_the_error_says_what_to_do(
    package: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def missing() -> None:
        raise gpunvme.CudaError("NVRTC was not found: pip install nvidia-cuda-nvrtc, or install a CUDA toolkit")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(module, "_nvrtc", missing)
    assert module.why_no_kernels().startswith(
        "gpunvme was built without nvcc, and cannot compile its kernels now: NVRTC"
    )
    with pytest.raises(gpunvme.CudaError, match=r"built without nvcc.*pip install nvidia-cuda-nvrtc"):
        module.own_kernels(Unloadable())
    package.write_bytes(b"a fat binary")
    os.utime(package, (2**33, 2**33))
    assert module.why_no_kernels() == ""
    module.own_kernels(Unloadable())


def test_compiled_kernels_are_taken_if_they_fit_the_gpu_and_are_not_older_than_their_source(
    package: Path, compiled: list[str]
) -> None:
    for content, seconds, compiles in ((b"fits", 2**33, 0), (b"for other GPUs", 2**33, 1), (b"fits", 1, 1)):
        package.write_bytes(content)
        os.utime(package, (seconds, seconds))
        compiled.clear()
        shutil.rmtree(module.cubin_directory(), ignore_errors=True)
        gpu = Unloadable()
        module.own_kernels(gpu)
        assert len(compiled) == compiles
        assert (gpu.given[0] == content) == (seconds > 1)


def test_the_example_for_numba_links(tmp_path: Path) -> None:
    """Numba's kernel and our device function, as far as it goes without a GPU."""
    if importlib.util.find_spec("numba_cuda") is None:
        pytest.skip("numba-cuda is not installed")
    if no_nvrtc():
        pytest.skip(no_nvrtc())
    program = """
import sys
sys.path.insert(0, sys.argv[1])
import gpu_kernel_numba as example
from cuda.core import Linker, LinkerOptions, ObjectCode
from numba import cuda, types
images = []
compile_to_cubin = example.gpu.compile_to_cubin
example.gpu.compile_to_cubin = lambda *arguments: images.append(compile_to_cubin(*arguments)) or images[-1]
kernel = example.make_kernel((9, 0))
ids, rows = types.int64[:, ::1], types.float32[:, ::1]
types_of = types.void(types.int64, types.int64, ids, rows, types.int64, rows, types.int64[::1])
ptx, _ = cuda.compile(kernel, types_of, device=False, cc=(9, 0), output="ptx", abi="numba")
parts = ObjectCode.from_ptx(ptx.encode()), ObjectCode.from_cubin(images[0])
print(len(Linker(*parts, options=LinkerOptions(arch="sm_90")).link("cubin").code) > 1000)
"""
    assert files.output(program, Path(__file__).parents[2] / "examples").endswith("True\n")


def test_messages_of_nvrtc_reach_the_caller() -> None:
    if no_nvrtc():
        pytest.skip(no_nvrtc())
    with pytest.raises(gpunvme.CudaError, match=r"mine\.cu\(2\)"):
        module.compile_to_cubin("#include <gpunvme/device.h>\nnonsense", (9, 0), (), "mine.cu")


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """What was really compiled; the cache is empty, and NVRTC need not be there."""
    done: list[str] = []

    def compile_to_cubin(source: str, capability: object, options: object, name: str) -> bytes:
        done.append(source)
        return f"cubin of {source} for {capability} with {options}".encode()

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(module, "compile_to_cubin", compile_to_cubin)
    monkeypatch.setattr(module, "_nvrtc_version", lambda: (13, 0))
    return done


def test_what_was_compiled_is_kept(compiled: list[str]) -> None:
    first = module._compiled("one", (9, 0), (), "x.cu")
    assert module._compiled("one", (9, 0), (), "x.cu") == first
    assert compiled == ["one"]
    for different in (("two", (9, 0), ()), ("one", (8, 0), ()), ("one", (9, 0), ("-DX",))):
        assert module._compiled(*different, "x.cu") != first
    assert len(compiled) == 4


def test_an_include_directory_of_ones_own_is_read_anew(compiled: list[str]) -> None:
    for _ in range(2):
        module._compiled("one", (9, 0), ("-I/somewhere",), "x.cu")
    assert len(compiled) == 2


def test_a_cache_that_cannot_be_written_is_no_error(
    compiled: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "gpunvme").write_text("a file where the directory should be")
    assert module._compiled("one", (9, 0), (), "x.cu") == module._compiled("one", (9, 0), (), "x.cu")
    assert len(compiled) == 2


@pytest.mark.parametrize("name", ["/nowhere/libcuda.so.1", "libc.so.6"])
def test_no_driver_is_a_clear_error(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    from gpunvme.gpu import driver

    monkeypatch.setenv("GPUNVME_LIBCUDA", name)
    driver.libcuda.cache_clear()
    try:
        with pytest.raises(gpunvme.CudaError, match=r"CUDA cannot be used.*driver"):
            compiling("", device=0)
    finally:
        driver.libcuda.cache_clear()
