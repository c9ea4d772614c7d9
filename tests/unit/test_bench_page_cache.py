"""A *cold* figure of a file that was cached is a lie by a factor of ten; so the state is made and then checked."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gpunvme.bench import machine, page_cache

MIB = 1 << 20


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(8 * MIB))
    if machine.filesystem(str(tmp_path))[0] in machine.IN_MEMORY:
        pytest.skip("temporary files live in memory here")
    if page_cache.bring(str(path), "hot", 8 * MIB) is None:
        pytest.skip("this kernel does not tell what is cached")
    return str(path)


@pytest.mark.parametrize(("state", "least", "most"), [("hot", 1, 1), ("cold", 0, 0.01), ("half", 0.45, 0.55)])
def test_a_file_is_brought_into_a_state(file: str, state: page_cache.State, least: float, most: float) -> None:
    fraction = page_cache.bring(file, state, 8 * MIB)
    assert fraction is not None
    assert least <= fraction <= most


def test_every_other_mib_is_cached_and_the_others_are_not(file: str) -> None:
    fraction = page_cache.bring(file, "alternating", 8 * MIB)
    assert fraction == pytest.approx(0.5, abs=0.05)
    fd = os.open(file, os.O_RDONLY)
    try:
        assert page_cache.resident_fraction(fd, MIB) == pytest.approx(1, abs=0.01)
        assert page_cache.resident_fraction(fd, 2 * MIB) == pytest.approx(0.5, abs=0.1)
    finally:
        os.close(fd)


def test_a_file_with_changes_that_are_not_on_the_drive_yet_becomes_cold_too(file: str) -> None:
    with open(file, "r+b") as changed:
        changed.write(os.urandom(MIB))
    fraction = page_cache.bring(file, "cold", 8 * MIB)
    assert fraction is not None
    assert fraction <= 0.01
    with open(file, "rb") as unchanged:
        assert len(unchanged.read()) == 8 * MIB


def test_a_file_that_cannot_become_cold_is_refused_instead_of_measured_hot() -> None:
    shared = Path("/dev/shm")
    if not os.access(shared, os.W_OK) or machine.filesystem(str(shared))[0] not in machine.IN_MEMORY:
        pytest.skip("no tmpfs here")
    path = shared / f"gpunvme-test-{os.getpid()}"
    path.write_bytes(b"x" * MIB)
    try:
        if page_cache.bring(str(path), "hot", MIB) is None:
            pytest.skip("this kernel does not tell what is cached")
        with pytest.raises(page_cache.StateError, match=r"stays in the page cache"):
            page_cache.bring(str(path), "cold", MIB)
    finally:
        path.unlink()


def test_where_the_kernel_does_not_tell_nothing_is_claimed(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_cache._native, "cached_bytes", lambda fd, offset, nbytes: None)
    assert page_cache.bring(file, "hot", 8 * MIB) is None
    assert page_cache.bring(file, "cold", 8 * MIB) is None
