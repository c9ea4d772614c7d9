"""Fixtures of tests on GPUs, real and emulated."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import numpy as np
import pytest
from gpu_queue_machine import SIZE


@pytest.fixture(scope="module")
def stored() -> bytes:
    """What a `gpu_queue_machine.Machine` is filled with."""
    return np.random.default_rng(5).integers(0, 256, SIZE, np.uint8).tobytes()


@pytest.fixture
def garbage_goes_between_tests() -> Iterator[None]:
    """Freeing GPU memory while a kernel runs may wait for it: the emulated GPU aborts. Garbage goes between tests."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()
    gc.collect()
