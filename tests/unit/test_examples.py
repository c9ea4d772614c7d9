"""The examples run: what a newcomer copies first."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import gpunvme

EXAMPLES = Path(__file__).parents[2] / "examples"
ARGUMENTS = {"load_checkpoint.py": ["model.safetensors"]}


@pytest.mark.parametrize("example", sorted(path.name for path in EXAMPLES.glob("[!g]*.py")) + ["gather_rows.py"])
def test_example_runs(example: str, tmp_path: Path) -> None:
    if example.startswith("torch_"):
        pytest.importorskip("torch")
    gpunvme.save_file({"weight": np.ones((3, 4), np.float32)}, tmp_path / "model.safetensors")
    run = subprocess.run(
        [sys.executable, EXAMPLES / example, *ARGUMENTS.get(example, [])],
        check=False,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert run.returncode == 0, run.stderr
    assert "by host" in run.stdout
    assert "False" not in run.stdout
