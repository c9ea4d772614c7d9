"""The examples with kernels of their own run: what somebody copies who writes one."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu

EXAMPLES = Path(__file__).parents[2] / "examples"


def _broken(module: str) -> str:
    """Why a module cannot be imported, if it cannot."""
    command = [sys.executable, "-c", f"import {module}"]
    run = subprocess.run(command, check=False, capture_output=True, text=True, timeout=100)
    return run.stderr.strip().splitlines()[-1] if run.returncode else ""


@pytest.mark.parametrize("framework", ["torch", "cupy", "cuda.core", "numba.cuda"])
def test_a_users_kernel(framework: str, tmp_path: Path) -> None:
    try:
        found = importlib.util.find_spec(framework)
    except ModuleNotFoundError:
        found = None
    if found is None:
        pytest.skip(f"{framework} is not installed")
    if framework == "numba.cuda" and (broken := _broken("numba.cuda.np.arrayobj")):
        pytest.skip(f"this Numba does not go with this NumPy: {broken}")
    name = {"cuda.core": "cuda_core", "numba.cuda": "numba"}.get(framework, framework)
    example = EXAMPLES / f"gpu_kernel_{name}.py"
    run = subprocess.run(
        [sys.executable, example], check=False, cwd=tmp_path, capture_output=True, text=True, timeout=100
    )
    assert run.returncode == 0, run.stderr
    assert "equal: True - failed reads: 0" in run.stdout
