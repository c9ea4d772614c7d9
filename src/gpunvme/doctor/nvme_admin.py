"""Two questions to a controller that the kernel drives: Identify Controller, and the health log.

By the kernel's passthrough ioctl, NVME_IOCTL_ADMIN_CMD of ``linux/nvme_ioctl.h``. Neither command changes anything.
The device file is root's; the log takes CAP_SYS_ADMIN even where others may open it.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
from dataclasses import dataclass

_ADMIN_CMD = 0xC0484E41  # _IOWR('N', 0x41, struct nvme_admin_cmd), 72 bytes
_IDENTIFY, _GET_LOG_PAGE = 0x06, 0x02
_CNS_CONTROLLER = 0x01
_HEALTH = 0x02
_ALL_NAMESPACES = 0xFFFF_FFFF
_TIMEOUT_MS = 2000


class _Command(ctypes.Structure):
    """``struct nvme_admin_cmd``."""

    _fields_ = [
        ("opcode", ctypes.c_uint8),
        ("flags", ctypes.c_uint8),
        ("rsvd1", ctypes.c_uint16),
        ("nsid", ctypes.c_uint32),
        ("cdw2", ctypes.c_uint32),
        ("cdw3", ctypes.c_uint32),
        ("metadata", ctypes.c_uint64),
        ("addr", ctypes.c_uint64),
        ("metadata_len", ctypes.c_uint32),
        ("data_len", ctypes.c_uint32),
        ("cdw10", ctypes.c_uint32),
        ("cdw11", ctypes.c_uint32),
        ("cdw12", ctypes.c_uint32),
        ("cdw13", ctypes.c_uint32),
        ("cdw14", ctypes.c_uint32),
        ("cdw15", ctypes.c_uint32),
        ("timeout_ms", ctypes.c_uint32),
        ("result", ctypes.c_uint32),
    ]


@dataclass(frozen=True)
class AdminAnswer:
    """What a controller said: 4096 bytes of Identify Controller, 512 bytes of its health log."""

    identify: bytes
    health: bytes


def ask_controller(device: str) -> AdminAnswer | str:
    """Ask the controller behind a device file.

    Parameters
    ----------
    device
        Such as ``/dev/nvme0``.

    Returns
    -------
    AdminAnswer or str
        The answers, or in words why there are none.
    """
    try:
        fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    except PermissionError:
        return f"{device} is for root only (sudo gpunvme doctor)"
    except OSError as error:
        return f"{device}: {error.strerror}"
    try:
        identify = _ask(fd, _IDENTIFY, 4096, 0, _CNS_CONTROLLER)
        # NUMDL, 0's based, in dwords; Base Specification 2.0, figure 196.
        health = _ask(fd, _GET_LOG_PAGE, 512, _ALL_NAMESPACES, (512 // 4 - 1) << 16 | _HEALTH)
    except PermissionError:
        return f"commands to {device} are for root only (sudo gpunvme doctor)"
    except OSError as error:
        return f"{device}: {error.strerror}"
    finally:
        os.close(fd)
    return AdminAnswer(identify, health)


def _ask(fd: int, opcode: int, nbytes: int, nsid: int, cdw10: int) -> bytes:
    data = ctypes.create_string_buffer(nbytes)
    command = _Command(
        opcode=opcode,
        nsid=nsid,
        addr=ctypes.addressof(data),
        data_len=nbytes,
        cdw10=cdw10,
        timeout_ms=_TIMEOUT_MS,
    )
    status = fcntl.ioctl(fd, _ADMIN_CMD, command)
    if status:  # a positive number is the command's NVMe status
        raise OSError(None, f"the controller refused command {opcode:02X}h with status {status:#x}")
    return data.raw
