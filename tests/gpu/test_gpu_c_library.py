"""The examples in CUDA C++, on a GPU, against the installed library."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from gpunvme.c_library import c_library

pytestmark = pytest.mark.gpu

EXAMPLES = Path(__file__).parents[2] / "examples"


def built(example: str, directory: Path) -> Path:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    library = c_library()
    program = directory / "program"
    rpath = ["-Xlinker", "-rpath", "-Xlinker", str(library.lib)]
    command = [nvcc, "-std=c++17", "-arch=native", EXAMPLES / example, "-o", program, *library.cflags]
    subprocess.run([*command, f"-L{library.lib}", "-lgpunvme", *rpath], check=True, timeout=100)
    return program


def test_a_file_is_read_behind_a_stream(tmp_path: Path) -> None:
    data = np.random.default_rng(1).integers(0, 256, 50_000_003, np.uint8)
    data.tofile(tmp_path / "data")
    command = [built("c_read_cuda.cu", tmp_path), tmp_path / "data"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "50000003 bytes by host" in done.stdout
    assert f"sum {data.sum(dtype=np.uint64)}" in done.stdout


def test_layers_are_what_the_file_says(tmp_path: Path) -> None:
    width, passes = 256, 6
    # Each row adds up to one, about: values neither vanish nor grow.
    matrices = np.random.default_rng(2).random((7, width, width), np.float32) / (width / 2)
    matrices.tofile(tmp_path / "weights")
    expected = np.full(width, np.frombuffer(b"\x3f" * 4, np.float32)[0], np.float64)
    for _ in range(passes):
        for matrix in matrices:
            expected = abs(matrix @ expected)
    command = [built("c_layers.cu", tmp_path), tmp_path / "weights", str(width), str(passes)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "7 layers of 262144 bytes, 6 times" in done.stdout
    first = float(done.stdout.rpartition("y[0] = ")[2])
    assert first == pytest.approx(expected[0], rel=1e-3)
