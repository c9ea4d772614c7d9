"""Compiling device code without a GPU. If this failed, kernels that include our headers would not compile somewhere."""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import gpunvme
from gpunvme.gpu import compile as compiling  # the function; its module is below
from gpunvme.gpu import include_directory

module = sys.modules["gpunvme.gpu.compile"]
KERNELS = Path(module.__file__).parent / "kernels"
# What the package ships its kernels for.
ARCHITECTURES = [75, *(pytest.param(each, marks=pytest.mark.slow) for each in (80, 86, 89, 90, 100)), 120]


@functools.cache
def nvcc() -> str:
    wheels = [root / "bin" / "nvcc" for root in module._roots()]
    return next((str(each) for each in wheels if each.is_file()), "") or shutil.which("nvcc") or ""


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


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_kernels_compile_with_nvcc(tmp_path: Path, architecture: int) -> None:
    if not nvcc():
        pytest.skip("no nvcc")
    knows = subprocess.run([nvcc(), "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    if f"compute_{architecture}\n" not in knows:
        pytest.skip(f"this nvcc does not know compute_{architecture}")
    command = [nvcc(), "-std=c++17", "-cubin", f"-arch=sm_{architecture}", f"-I{include_directory()}"]
    try:
        command.append(f"-I{module.cccl_directory()}")
    except gpunvme.CudaError:
        pass  # nvcc has its own
    command += ["-o", str(tmp_path / "kernels.cubin"), str(KERNELS / "all.cu")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr


@pytest.mark.parametrize("capability", [(7, 5), (9, 0), (12, 0)])
def test_the_kernels_compile_with_nvrtc(capability: tuple[int, int]) -> None:
    if no_nvrtc():
        pytest.skip(no_nvrtc())
    image = module.compile_to_cubin((KERNELS / "all.cu").read_text(), capability, (), "all.cu")
    for kernel in (b"gpunvme_gather", b"gpunvme_scatter", b"gpunvme_stream", b"gpunvme_set_up", b"gpunvme_reap"):
        assert kernel in image


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
