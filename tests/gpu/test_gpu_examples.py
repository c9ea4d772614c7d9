"""The examples with kernels of their own run: what somebody copies who writes one."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("framework", ["torch", "cupy", "cuda.core", "numba.cuda"])
def test_a_users_kernel(framework: str, tmp_path: Path) -> None:
    try:
        found = importlib.util.find_spec(framework)
    except ModuleNotFoundError:
        found = None
    if found is None:
        pytest.skip(f"{framework} is not installed")
    name = {"cuda.core": "cuda_core", "numba.cuda": "numba"}.get(framework, framework)
    example = EXAMPLES / f"gpu_kernel_{name}.py"
    run = subprocess.run(
        [sys.executable, example], check=False, cwd=tmp_path, capture_output=True, text=True, timeout=100
    )
    assert run.returncode == 0, run.stderr
    assert "equal: True - failed reads: 0" in run.stdout
