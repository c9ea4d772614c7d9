"""GPUDirect Storage on a libcufile that misbehaves: cases in processes of their own."""

from __future__ import annotations

from types import ModuleType

import pytest

import fake_cufile
import fake_cufile_cases
import fake_cufile_layers
import fake_cufile_proof_cases
import own_process

CASES = [
    pytest.param(module, name, id=name)
    for module in (fake_cufile_cases, fake_cufile_layers, fake_cufile_proof_cases)
    for name in sorted(vars(module))
    if name.startswith("test_")
]


@pytest.mark.parametrize(("module", "case"), CASES)
def test_on_the_fake_cufile(module: ModuleType, case: str) -> None:
    if reason := fake_cufile.why_not():
        pytest.skip(reason)
    assert module.__file__ is not None
    own_process.check(module.__file__, case)
