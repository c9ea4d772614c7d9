"""The library for C, as it is installed: a program that is compiled as `gpunvme config` says works."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from gpunvme.c_library import c_library
from gpunvme.cli import main
from gpunvme.cli.exits import Exit

EXAMPLES = Path(__file__).parents[2] / "examples"
COMPILER = shutil.which("cc") or shutil.which("gcc")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C compiler")


def run(*command: object, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(each) for each in command],
        check=False,
        capture_output=True,
        text=True,
        timeout=100,
        cwd=cwd,
        env={**os.environ, **environment},
    )


def asked(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """What `gpunvme config` prints."""
    assert main(["config", *options]) == Exit.OK
    return capsys.readouterr().out.strip()


def check_read(program: Path, directory: Path) -> None:
    data = directory / "data"
    data.write_bytes(np.random.default_rng(1).bytes(200_000))
    done = run(program, data)
    assert done.returncode == 0, done.stderr
    assert "read: 200000 bytes" in done.stdout
    assert "gather: 64000 bytes" in done.stdout
    assert "by host" in done.stdout
    missing = run(program, directory / "none")
    assert missing.returncode == 1
    assert "none: cannot open: No such file" in missing.stderr


@needs_compiler
@pytest.mark.parametrize("language", ["c", "c++"])
def test_a_compiler(language: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = asked(capsys, "--cflags", "--libs").split()
    program = tmp_path / "c_read"
    strict = ["-std=c99"] if language == "c" else ["-std=c++17", "-fpermissive", "-w"]  # C's malloc needs no cast
    done = run(
        COMPILER, "-x", language, *strict, "-pedantic", EXAMPLES / "c_read.c", "-x", "none", "-o", program, *flags
    )
    assert done.returncode == 0, done.stderr
    if language == "c":
        assert done.stderr == ""
    check_read(program, tmp_path)


@needs_compiler
@pytest.mark.parametrize("rows", [1, 7, 5000])
def test_regions_in_pieces(rows: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import gpunvme

    table = np.random.default_rng(4).integers(0, 256, (rows, 25), np.uint8)
    with gpunvme.Catalog.create(tmp_path / "catalog") as catalog:
        catalog.add(3, b"other")
        catalog.add(7, table, name="rows")
    program = tmp_path / "c_regions"
    strict = ["-std=c99", "-pedantic", "-Wall", "-Wextra", "-Werror"]
    flags = asked(capsys, "--cflags", "--libs").split()
    done = run(COMPILER, *strict, EXAMPLES / "c_regions.c", "-o", program, *flags)
    assert done.returncode == 0, done.stderr
    done = run(program, tmp_path / "catalog", "rows")
    assert done.returncode == 0, done.stderr
    assert f"7: {25 * rows} bytes, records of 25" in done.stdout
    assert f"rows: sum {table.sum()} at once, {table.sum()} in " in done.stdout
    missing = run(program, tmp_path / "catalog", "columns")
    assert missing.returncode == 1
    assert 'no region that is called "columns"' in missing.stderr


@needs_compiler
@pytest.mark.skipif(shutil.which("pkg-config") is None, reason="no pkg-config")
def test_pkg_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = asked(capsys, "--pkg-config")
    told = run("pkg-config", "--cflags", "--libs", "gpunvme", PKG_CONFIG_PATH=directory)
    assert told.returncode == 0, told.stderr
    program = tmp_path / "c_read"
    assert COMPILER is not None
    done = run(COMPILER, EXAMPLES / "c_read.c", "-o", program, *told.stdout.split())
    assert done.returncode == 0, done.stderr
    check_read(program, tmp_path)


@needs_compiler
@pytest.mark.skipif(shutil.which("cmake") is None, reason="no CMake")
def test_cmake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.22)\nproject(example LANGUAGES C)\nfind_package(gpunvme REQUIRED)\n"
        f"add_executable(c_read {EXAMPLES / 'c_read.c'})\ntarget_link_libraries(c_read PRIVATE gpunvme::gpunvme)\n"
    )
    where = f"-Dgpunvme_DIR={asked(capsys, '--cmake')}"
    made = run("cmake", "-S", tmp_path, "-B", tmp_path / "build", "-G", "Unix Makefiles", where)
    assert made.returncode == 0, made.stderr
    built = run("cmake", "--build", tmp_path / "build")
    assert built.returncode == 0, built.stderr + built.stdout
    check_read(tmp_path / "build" / "c_read", tmp_path)


@pytest.mark.parametrize("example", ["c_read_cuda.cu", "c_layers.cu"])
def test_cuda_examples_compile(example: str, tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    library = c_library()
    flags = [*library.cflags, "-std=c++17", "-Werror", "all-warnings", f"-L{library.lib}", "-lgpunvme"]
    done = run(nvcc, EXAMPLES / example, "-o", tmp_path / "program", *flags)
    assert done.returncode == 0, done.stderr
    # No GPU here, or one that shows nothing: it says so, and does not crash.
    refused = run(tmp_path / "program", LD_LIBRARY_PATH=str(library.lib))
    assert refused.returncode == 1
    assert "usage" in refused.stderr


def test_only_the_interface_is_exported() -> None:
    library = c_library()
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("no nm")
    told = run(nm, "-D", "--defined-only", library.file).stdout
    exported = {line.split()[-1] for line in told.splitlines()}
    header = (library.include / "gpunvme" / "gpunvme.h").read_text()
    declared = {line.split("(")[0].split()[-1].lstrip("*") for line in header.splitlines() if "GPUNVME_API " in line}
    declared -= {"GPUNVME_API"}
    declared = {each for each in declared if each.startswith("gpunvme_")}
    assert "gpunvme_layer_loader_load_layer" in declared
    assert exported == declared


def test_no_python_is_in_it() -> None:
    needed = run("ldd", c_library().file) if shutil.which("ldd") else None
    if needed is None:
        pytest.skip("no ldd")
    assert "libpython" not in needed.stdout
    assert "libcuda" not in needed.stdout  # opened when it is needed, where there is one


def test_beside_the_package_in_one_process(tmp_path: Path) -> None:
    # A process may hold both: the library has an engine of its own.
    import gpunvme

    data = np.random.default_rng(2).bytes(300_000)
    (tmp_path / "data").write_bytes(data)
    library = ctypes.CDLL(str(c_library().file))
    handle = ctypes.c_uint64()
    memory = ctypes.create_string_buffer(300_000)
    assert library.gpunvme_init(ctypes.c_uint32(1)) == 0
    try:
        assert library.gpunvme_open(str(tmp_path / "data").encode(), ctypes.c_uint32(0), ctypes.byref(handle)) == 0
        arguments = (handle, ctypes.c_int64(0), ctypes.c_uint64(300_000), memory, ctypes.c_int32(-1), None)
        with gpunvme.open(tmp_path / "data") as file:
            assert library.gpunvme_read(*arguments, ctypes.c_int64(60_000), None) == 0
            assert np.asarray(file.read()).tobytes() == memory.raw == data
    finally:
        assert library.gpunvme_shutdown() == 0


def test_a_catalog_that_python_wrote(tmp_path: Path) -> None:
    import gpunvme

    rows = np.random.default_rng(3).integers(0, 1 << 30, (1000, 25), np.int32)
    with gpunvme.Catalog.create(tmp_path / "catalog") as catalog:
        catalog.add(7, rows, name="rows")
    library = ctypes.CDLL(str(c_library().file))
    handle, kind = ctypes.c_uint64(), ctypes.c_uint64()
    memory = np.zeros((10, 25), np.int32)
    assert library.gpunvme_init(ctypes.c_uint32(1)) == 0
    try:
        assert library.gpunvme_open_catalog(str(tmp_path / "catalog").encode(), ctypes.byref(handle)) == 0
        assert library.gpunvme_catalog_find(handle, b"rows", ctypes.byref(kind)) == 0
        assert kind.value == 7
        to = ctypes.c_void_p(memory.ctypes.data)
        records = (ctypes.c_uint64(100), ctypes.c_uint64(10))
        how = (to, ctypes.c_int32(-1), None, ctypes.c_int64(60_000), None)
        assert library.gpunvme_kind_read(handle, None, ctypes.c_uint64(0), kind, *records, *how) == 0
        assert np.array_equal(memory, rows[100:110])
    finally:
        assert library.gpunvme_shutdown() == 0


def test_config_wants_to_know_what(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config"]) == Exit.USAGE
    assert "--cflags" in capsys.readouterr().err
    assert Path(asked(capsys, "--library")).name == "libgpunvme.so.1"
