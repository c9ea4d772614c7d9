"""Files, namespaces, layers and GPU memory, on the libcuda for tests: cases that are in modules of their own.

Each module runs in a process of its own: the engine chooses its libcuda once, and CUDA once used is refused in forked
children; other tests want neither.
"""

from __future__ import annotations

import os
from types import ModuleType

import pytest

import emulated_gpu_layers
import emulated_gpu_path_cases
import fake_gpu_cases
import fake_gpu_driver_cases
import fake_gpu_layers
import fake_gpu_path_cases
import own_process

MODULES = [fake_gpu_cases, fake_gpu_driver_cases, fake_gpu_layers, fake_gpu_path_cases]
MODULES += [emulated_gpu_path_cases, emulated_gpu_layers]
CASES = [
    pytest.param(module, name, id=name)
    for module in MODULES
    for name in sorted(vars(module))
    if name.startswith("test_")
]


@pytest.mark.parametrize(("module", "case"), CASES)
def test_on_the_fake_gpu(module: ModuleType, case: str) -> None:
    if not os.environ.get("GPUNVME_FAKE_LIBCUDA"):
        pytest.skip("no libcuda for tests: run `make native-plain`, or name it in GPUNVME_FAKE_LIBCUDA")
    assert module.__file__ is not None
    own_process.check(module.__file__, case)
