"""MSI-X vectors of a VFIO device, passed on to eventfds. Our driver polls; who waits for interrupts asks for them."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from gpunvme.nvme import vfio_uapi as uapi

_HEAD = struct.Struct("=5I")  # struct vfio_irq_set: argsz, flags, index, start, count


def count_vectors(fd: int) -> int:
    """Return how many MSI-X vectors a device has."""
    info = uapi.IrqInfo.new(index=uapi.MSIX_IRQS)
    uapi.call(fd, uapi.DEVICE_GET_IRQ_INFO, info)
    return int(info.count)


def set_vectors(fd: int, events: Sequence[int]) -> None:
    """Pass vectors 0, 1, … on to eventfds, one each; no more of them than there are. None: switch them off.

    All at once: vectors that are added later take Linux 6.5.

    Raises
    ------
    OSError
        As the kernel answers.
    """
    flags = uapi.IRQ_SET_ACTION_TRIGGER | (uapi.IRQ_SET_DATA_EVENTFD if events else uapi.IRQ_SET_DATA_NONE)
    nbytes = _HEAD.size + 4 * len(events)
    request = _HEAD.pack(nbytes, flags, uapi.MSIX_IRQS, 0, len(events)) + struct.pack(f"={len(events)}i", *events)
    uapi.call(fd, uapi.DEVICE_SET_IRQS, bytearray(request))
