"""GPU queues as `gpunvme accept` tries them, in a process of their own: a libcuda for tests serves it alone.

If this failed, the table of a person with a drive and a GPU, which nobody here has, would say nothing.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

import own_process

MODULE = Path(__file__).parent.parent / "accept_gpu_cases.py"


@pytest.mark.parametrize("case", re.findall(r"^def (test_\w+)", MODULE.read_text(), re.MULTILINE))
def test_on_the_emulated_gpu(case: str) -> None:
    if not os.environ.get("GPUNVME_FAKE_LIBCUDA"):
        pytest.skip("no libcuda for tests: run `make native-plain`, or name it in GPUNVME_FAKE_LIBCUDA")
    own_process.check(str(MODULE), case)
