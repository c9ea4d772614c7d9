"""Fixtures and helpers of the cases that run on the libcufile for tests; a pytest plugin of theirs."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

import pytest

import fake_cufile
import gpunvme
from files import MIB
from gpunvme.cufile import driver, facts, requests

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from fake_cuda import FakeCuda
    from fake_cufile import FakeCufile


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[FakeCuda, FakeCufile]]:
    # Pieces small enough that there are many.
    monkeypatch.setattr(requests, "PIECE_BYTES", MIB)
    cuda, cufile = fake_cufile.use()
    yield cuda, cufile
    # The real one would never have come back from the first.
    assert cufile.count("batches_in_compat") == cufile.count("streams_in_compat") == 0
    cufile.reset()
    gc.collect()
    driver.close()
    assert cufile.count("live_handles") == cufile.count("live_buffers") == 0
    assert cufile.count("live_streams") == cufile.count("live_batches") == 0
    assert cufile.count("busy_deregistrations") == cufile.count("stale_io") == 0
    cuda.reset()


@pytest.fixture
def cuda(fakes: tuple[FakeCuda, FakeCufile]) -> FakeCuda:
    return fakes[0]


@pytest.fixture
def cufile(fakes: tuple[FakeCuda, FakeCufile]) -> FakeCufile:
    return fakes[1]


@pytest.fixture
def with_nvidia_fs(cufile: FakeCufile, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine that has the module, and a libcufile that found it."""
    driver.close()
    cufile.set(props=1, mode=1)
    monkeypatch.setattr(facts, "nvidia_fs", lambda: "2.26")
    yield
    driver.close()


@pytest.fixture(params=[fake_cufile.COMPAT, fake_cufile.NVIDIA_FS])
def way(request: pytest.FixtureRequest) -> str:
    """The path's name, in compatibility mode and on a machine with nvidia-fs."""
    name = str(request.param)
    if name == fake_cufile.NVIDIA_FS:
        request.getfixturevalue("with_nvidia_fs")
    return name


@pytest.fixture
def file_of_way(way: str, place: Path, data: bytes) -> Iterator[gpunvme.File]:
    with gpunvme.open(place, path=way) as opened:
        yield opened


@pytest.fixture
def direct_file(with_nvidia_fs: None, place: Path, data: bytes) -> Iterator[gpunvme.File]:
    """Where batches and stream order are used."""
    with gpunvme.open(place, path=fake_cufile.NVIDIA_FS) as opened:
        yield opened


@pytest.fixture
def records(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gpunvme" / "paths.json"
