"""Where no guest can be booted, its tests are skipped; where QEMU is installed and CI=true, they fail."""

from __future__ import annotations

import os
import shutil

import guest
import pytest

# Debian's kernels have neither iommufd nor the mode without an IOMMU: for a kernel that somebody has put here.
collect_ignore = [] if (guest.PARTS / guest.SECOND).is_dir() else ["test_guest_second_kernel.py"]


@pytest.fixture(scope="session", autouse=True)
def guests() -> None:
    why = guest.why_not()
    if why and os.environ.get("CI") == "true" and shutil.which("qemu-system-x86_64"):
        pytest.fail(f"QEMU is installed, but no guest can be started: {why}")
    if why:
        pytest.skip(why)
