"""gpunvme's kernel module, built for the kernels of the guests, and checked in them."""

from __future__ import annotations

import re
import shutil
import subprocess
from typing import TYPE_CHECKING

import disks
import guest

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

SOURCE = guest.REPOSITORY / "kmod"
FOR_TESTS = guest.REPOSITORY / "tests/qemu/modules"
PROGRAMS = ("kmod", "kmod_dmabufs", "kmod_faults", "kmod_hostile")
# Red zones, poisoned free memory (Documentation/mm/slub.rst), and KFENCE where there is one: what packaged kernels have
# of KASAN. What they find, they log as a BUG, and the check that ran fails.
CHECKED = "intel_iommu=on slub_debug=FZP,kmalloc-* kfence.sample_interval=10"
# Of the kernel's makefiles, about the machine: it is not the one that the kernel was built on.
USUAL = re.compile(r"the compiler differs|pahole version differs|Skipping BTF generation")


def build(kernel: str, folder: Path, *options: str) -> tuple[Path, str]:
    """Build the module in a folder of its own; return it, and what make said that it should not have.

    Raises
    ------
    AssertionError
        If it cannot be built.
    """
    shutil.copytree(SOURCE, folder)
    return folder / "gpunvme.ko", _make(["-C", str(folder), f"KDIR={tree_of(kernel)}"], options)


def build_for_tests(kernel: str, folder: Path) -> Path:
    """Build the modules that tests load beside it; return the folder that they are in.

    Raises
    ------
    AssertionError
        If they cannot be built, or not without a warning.
    """
    shutil.copytree(FOR_TESTS, folder)
    complaints = _make(["-C", str(tree_of(kernel)), f"M={folder}", "modules"], ["W=1"])
    assert not complaints, complaints
    return folder


def tree_of(kernel: str) -> Path:
    """Where a kernel's headers are."""
    return (guest.PARTS / f"{kernel}-headers" / "tree").resolve()


def _make(arguments: Sequence[str], options: Sequence[str]) -> str:
    command = ["make", *arguments, "CC=gcc", "HOSTCC=gcc", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-8000:]
    complaints = [
        line for line in said.splitlines() if re.search(r"\b(warning|error): ", line) and not USUAL.search(line)
    ]
    return "\n".join(complaints)


def build_selftest(folder: Path) -> Path:
    """Build the program that people try the module with, beside a module that was built there."""
    subprocess.run(
        ["make", "-s", "-C", folder / "selftest", "CFLAGS=-O2 -Wall -Wextra -Werror"], check=True, timeout=60
    )
    return folder / "selftest" / "selftest"


def checks_on(kernel: str, folder: Path, *, loads: int) -> guest.Checks:
    """Boot a kernel, and run everything that is checked of the module; it is loaded and unloaded ``loads`` times."""
    build(kernel, folder / "kmod")
    modules = build_for_tests(kernel, folder / "modules")
    shutil.copy(folder / "kmod" / "gpunvme.ko", modules)
    selftest = build_selftest(folder / "kmod")
    return guest.run_checks(
        PROGRAMS,
        folder,
        devices=disks.with_slow,
        kernel=kernel,
        options=CHECKED,
        environment={"GUEST_MODULES": str(modules), "GUEST_SELFTEST": str(selftest), "GUEST_LOADS": str(loads)},
        timeout=600,
    )
