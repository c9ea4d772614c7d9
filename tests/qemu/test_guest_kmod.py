"""The kernel module: built for two kernels, and driven in guests that run them, behind an IOMMU."""

from __future__ import annotations

import os
import shutil
import subprocess
from typing import TYPE_CHECKING

import guest
import module
import pytest

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.timeout(900)

KERNELS = (guest.DEBIAN, guest.NEW)


@pytest.mark.parametrize("kernel", KERNELS)
def test_builds_without_a_warning(kernel: str, tmp_path: Path) -> None:
    _, complaints = module.build(kernel, tmp_path / "kmod", "W=1")
    assert not complaints


@pytest.mark.skipif(not shutil.which("sparse"), reason="sparse is not installed (apt-get install sparse)")
def test_sparse_finds_nothing(tmp_path: Path) -> None:
    _, complaints = module.build(guest.DEBIAN, tmp_path / "kmod", "C=2", "CF=-D__CHECK_ENDIAN__")
    assert not complaints


def style(program: str) -> subprocess.CompletedProcess[str]:
    """``make style`` with one program of a kernel's source; what is not named is left out."""
    programs = {"CHECKPATCH": "", "KERNEL_DOC": "", **dict([program.split("=", 1)])}
    command = ["make", "-s", "-C", str(module.SOURCE), "style", *(f"{name}={path}" for name, path in programs.items())]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def test_every_part_is_described() -> None:
    """By the program that makes the kernel's own documents; newer headers do not have it."""
    done = style(f"KERNEL_DOC={module.tree_of(guest.DEBIAN) / 'scripts/kernel-doc'}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no kernel-doc here" not in done.stdout


@pytest.mark.skipif("GPUNVME_CHECKPATCH" not in os.environ, reason="GPUNVME_CHECKPATCH names no checkpatch.pl")
def test_style_is_the_kernels() -> None:
    done = style(f"CHECKPATCH={os.environ['GPUNVME_CHECKPATCH']}")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def on_debian(tmp_path_factory: pytest.TempPathFactory) -> guest.Checks:
    return module.checks_on(guest.DEBIAN, tmp_path_factory.mktemp("old"), loads=100)


@pytest.fixture(scope="module")
def on_new(tmp_path_factory: pytest.TempPathFactory) -> guest.Checks:
    """A kernel that has udmabuf, whose memory stands for another device's."""
    return module.checks_on(guest.NEW, tmp_path_factory.mktemp("new"), loads=100 if guest.LONG else 10)


@pytest.mark.parametrize(("program", "name"), guest.checks_of(*module.PROGRAMS))
def test_on_debian_12(on_debian: guest.Checks, program: str, name: str) -> None:
    on_debian.expect(program, name)


@pytest.mark.parametrize(("program", "name"), guest.checks_of(*module.PROGRAMS))
def test_on_a_new_kernel(on_new: guest.Checks, program: str, name: str) -> None:
    on_new.expect(program, name)


def test_dmabufs_were_there(on_new: guest.Checks) -> None:
    """The check of dma-bufs passes without one where the kernel has none: this one has."""
    assert not on_new.expect("kmod_dmabufs", "data_goes_into_a_dmabuf_and_out_of_it").facts
