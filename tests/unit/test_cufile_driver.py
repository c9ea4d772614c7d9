"""The cuFile driver where it cannot be used: each in a process of its own, and none of them hangs or leaves a trace."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest

import fake_cufile
import files
from files import MIB

if TYPE_CHECKING:
    from pathlib import Path

READ = """
import os, sys
import fake_cuda
cuda = fake_cuda.use()
import gpunvme
def read(path):
    with gpunvme.open(sys.argv[1], path=path) as file, cuda.alloc(1 << 20) as buffer:
        transfer = file.read_into(buffer)
        assert buffer.peek() == open(sys.argv[1], "rb").read(1 << 20)
        return transfer
"""
REFUSED = (
    READ
    + """
for _ in range(2):
    try:
        print(read("cufile/compat"))
    except gpunvme.PathError as error:
        print(error)
assert read("auto").path == "host"
"""
)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    files.make(tmp_path / "file", 2 * MIB)
    return tmp_path / "file"


def said(program: str, place: Path, *, library: str = "libcufile_fake.so", **more: str) -> str:
    env = {**fake_cufile.environment(library), "XDG_CACHE_HOME": str(place.parent / "cache"), **more}
    return files.output(program, place, env=env)


def test_a_driver_that_does_not_open(place: Path) -> None:
    """cuFileDriverOpen never returns on some machines: a child process finds out, and is ended."""
    text = said(REFUSED, place, GPUNVME_FAKE_CUFILE="open_hang_ms=600000", GPUNVME_CUFILE_DEADLINE="2")
    assert "cuFileDriverOpen did not return within 2 s in a child process" in text


@pytest.mark.parametrize(("code", "words"), [(5001, "nvidia-fs driver is not loaded"), (5099, "5099")])
def test_a_driver_that_refuses(place: Path, code: int, words: str) -> None:
    lines = said(REFUSED, place, GPUNVME_FAKE_CUFILE=f"open_error={code}").splitlines()
    assert len(lines) == 2
    assert all(words in line and "cuFile cannot be used" in line for line in lines)


def test_a_library_from_before_statistics_batches_and_streams(place: Path) -> None:
    """Bytes come all the same, one request after the other; nothing is claimed that nothing shows."""
    program = (
        READ
        + """
print(read("cufile/compat"))
with gpunvme.open(sys.argv[1], path="cufile/compat") as file, cuda.alloc(1 << 20) as buffer:
    print(file.read_into(buffer, wait=False).wait(20))
    file.gather([1, 2], 4096, out=buffer)
    print(file.last_transfer)
"""
    )
    lines = said(program, place, library="libcufile_fake_old.so", GPUNVME_FAKE_CUFILE="version=1040").splitlines()
    assert len(lines) == 3
    assert all("nothing shows that the bytes went past host memory" in line and "cuFile 1.4" in line for line in lines)
    assert "not in stream order" in lines[1]
    assert "not in batches" in lines[2]


def test_a_library_that_is_none(place: Path) -> None:
    env = {**fake_cufile.environment(), "GPUNVME_LIBCUFILE": "/nowhere/libcufile.so.0"}
    assert "/nowhere/libcufile.so.0" in files.output(REFUSED, place, env=env)


def test_without_the_bindings(place: Path) -> None:
    program = "import sys; sys.modules['cuda'] = None\n" + REFUSED
    assert "pip install gpunvme[gds]" in said(program, place)


def test_without_a_gpu(place: Path) -> None:
    program = """
import sys, gpunvme
try:
    gpunvme.open(sys.argv[1], path="cufile/compat")
except gpunvme.PathError as error:
    print(error)
"""
    env = {**fake_cufile.environment(), "GPUNVME_LIBCUDA": "/nowhere/libcuda.so.1"}
    assert "no CUDA driver" in files.output(program, place, env=env)


def test_its_log_goes_elsewhere(place: Path) -> None:
    """libcufile would drop one into the working directory."""
    program = (
        READ
        + """
read("cufile/compat")
print(os.environ["CUFILE_LOGFILE_PATH"])
"""
    )
    assert said(program, place).strip() == str(place.parent / "cache" / "gpunvme" / "cufile.log")
    theirs = place.parent / "theirs.log"
    assert said(program, place, CUFILE_LOGFILE_PATH=str(theirs)).strip() == str(theirs)


def test_a_process_that_ends_in_the_middle(place: Path) -> None:
    """What is in flight is stopped, and the driver closed after it."""
    program = (
        READ
        + """
file = gpunvme.open(sys.argv[1], path="cufile/compat")
buffers = [cuda.alloc(1 << 20) for _ in range(8)]
jobs = [file.read_into(buffer, wait=number % 2 == 0 and number < 4) for number, buffer in enumerate(buffers)]
"""
    )
    said(program, place, GPUNVME_FAKE_CUFILE="delay_us=100000")


def test_a_driver_that_is_open_already(place: Path) -> None:
    """Another library of this process opened it: used, and left open."""
    program = (
        READ
        + """
from cuda.bindings import cufile
import ctypes
lib = ctypes.CDLL(os.environ["GPUNVME_LIBCUFILE"])
from gpunvme.cufile import driver, library
library.bindings()
cufile.driver_open()
assert read("cufile/compat").path == "cufile/compat"
driver.close()
lib.fake_cufile_counter.restype = ctypes.c_uint64
print(lib.fake_cufile_counter(b"open"))
"""
    )
    assert said(program, place).strip() == "1"


def test_found_by_the_dynamic_linker(place: Path) -> None:
    """As an installed library is, without GPUNVME_LIBCUFILE."""
    folder = place.parent / "lib"
    folder.mkdir()
    env = fake_cufile.environment()
    shutil.copy(env["GPUNVME_LIBCUFILE"], folder / "libcufile.so.0")
    program = (
        READ
        + """
from gpunvme.cufile import library
print(read("cufile/compat").path, library.loaded_file())
"""
    )
    told = files.output(
        program,
        place,
        env={**env, "GPUNVME_LIBCUFILE": "", "LD_LIBRARY_PATH": str(folder), "XDG_CACHE_HOME": str(folder)},
    )
    path, loaded = told.split()
    assert path == "cufile/compat"
    if "site-packages" in loaded:
        pytest.skip(f"an installed libcufile comes first: {loaded}")
    assert loaded == str(folder / "libcufile.so.0")
