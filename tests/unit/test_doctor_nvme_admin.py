"""The two commands that `gpunvme doctor` sends through the kernel's driver: the right ones, and harmless.

A wrong opcode here goes to a drive that holds somebody's data.
"""

from __future__ import annotations

import ctypes
import errno
import os
from typing import TYPE_CHECKING, Any

import pytest

from gpunvme.doctor import nvme_admin
from gpunvme.doctor.nvme_admin import AdminAnswer, ask_controller

if TYPE_CHECKING:
    from pathlib import Path


def test_structure_and_number_are_the_kernels() -> None:
    # linux/nvme_ioctl.h: 72 bytes; _IOWR('N', 0x41, struct nvme_admin_cmd) as asm-generic/ioctl.h forms it.
    assert ctypes.sizeof(nvme_admin._Command) == 72
    number = 3 << 30 | 72 << 16 | ord("N") << 8 | 0x41
    assert number == nvme_admin._ADMIN_CMD
    assert (nvme_admin._Command.addr.offset, nvme_admin._Command.cdw10.offset) == (24, 40)


def test_only_identify_and_the_health_log_are_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int, int, int]] = []

    def controller(fd: int, number: int, command: Any) -> int:
        asked.append((command.opcode, command.nsid, command.cdw10, command.data_len))
        ctypes.memset(command.addr, len(asked), command.data_len)
        return 0

    monkeypatch.setattr(nvme_admin.fcntl, "ioctl", controller)
    (tmp_path / "nvme0").write_bytes(b"")
    answer = ask_controller(str(tmp_path / "nvme0"))
    assert asked == [(0x06, 0, 1, 4096), (0x02, 0xFFFFFFFF, 127 << 16 | 0x02, 512)]
    assert answer == AdminAnswer(b"\1" * 4096, b"\2" * 512)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (PermissionError(errno.EACCES, os.strerror(errno.EACCES)), "for root only"),
        (OSError(errno.ENOTTY, os.strerror(errno.ENOTTY)), "Inappropriate ioctl"),
        (0x4002, "0x4002"),
    ],
)
def test_refusals_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: OSError | int, words: str) -> None:
    def controller(fd: int, number: int, command: Any) -> int:
        if isinstance(answer, OSError):
            raise answer
        return answer

    (tmp_path / "nvme0").write_bytes(b"")
    monkeypatch.setattr(nvme_admin.fcntl, "ioctl", controller)
    before = len(os.listdir("/proc/self/fd"))
    told = ask_controller(str(tmp_path / "nvme0"))
    assert isinstance(told, str)
    assert words in told
    assert len(os.listdir("/proc/self/fd")) == before


def test_device_that_is_not_there(tmp_path: Path) -> None:
    assert "No such file" in str(ask_controller(str(tmp_path / "nvme9")))
