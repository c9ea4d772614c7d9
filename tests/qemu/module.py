"""gpunvme's kernel module, built for the kernels of the guests."""

from __future__ import annotations

import re
import shutil
import subprocess
from typing import TYPE_CHECKING

import guest

if TYPE_CHECKING:
    from pathlib import Path

SOURCE = guest.REPOSITORY / "kmod"
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
    tree = guest.PARTS / f"{kernel}-headers" / "tree"
    command = ["make", "-C", str(folder), f"KDIR={tree.resolve()}", "CC=gcc", "HOSTCC=gcc", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-8000:]
    complaints = [
        line for line in said.splitlines() if re.search(r"\b(warning|error): ", line) and not USUAL.search(line)
    ]
    return folder / "gpunvme.ko", "\n".join(complaints)


def build_selftest(folder: Path) -> Path:
    """Build the program that people try the module with, beside a module that was built there."""
    subprocess.run(
        ["make", "-s", "-C", folder / "selftest", "CFLAGS=-O2 -Wall -Wextra -Werror"], check=True, timeout=60
    )
    return folder / "selftest" / "selftest"
