"""kill -9 at any moment: every content is still there, exactly once, and the next start has put things in order."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import files

LONG = os.environ.get("GPUNVME_TEST_LEVEL", "short") == "long"


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A directory in memory, if there is one: a killed process loses nothing there either, and fsync costs nothing."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="gpunvme-tiers-") as directory:
        yield Path(directory)


@pytest.mark.parametrize(
    ("operation", "least"),
    [
        ("first-start", 30),
        ("start", 20),
        ("migrate", 120),
        ("changed", 250),
        ("add", 80),
        ("move-in", 80),
        ("replace", 80),
        ("replace-elsewhere", 110),
        ("remove", 60),
    ],
)
@pytest.mark.timeout(600)
def test_killed_at_any_call(operation: str, least: int, memory: Path) -> None:
    """In the long form at every call; in the short one at every third of a move's, else at every seventh."""
    every = 1 if LONG else 3 if operation == "migrate" else 7
    killed = Path(__file__).parent / "killed.py"
    child = files.run([sys.executable, "-W", "ignore", killed, memory, operation, every], timeout=570)
    assert int(files.ended_well(child)) >= least // every  # else the calls are not met any more
    assert child.stderr == ""
