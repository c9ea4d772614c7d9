"""The PCI configuration space of an emulated NVMe controller: what finds it, what its BARs are, how it is switched on.

Offsets and bits are those of the PCI Local Bus Specification 3.0, the PCI Express Base Specification 4.0 and the PCI
Power Management Specification 1.2; NVMe over PCIe 1.0, section 3.3, says what of it a controller must have. The
Linux kernel finds the driver by the class code.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum

CONFIG_BYTES = 4096
"""Size of a PCI Express function's configuration space."""
CLASS_NVME = 0x010802
"""Class code: mass storage, non-volatile memory, NVM Express I/O controller."""
MSIX_BAR = 4
"""The BAR that holds the MSI-X table and, from `MSIX_PBA` on, its pending bits."""
MSIX_PBA = 0x8000
MSIX_BAR_BYTES = 0x10000
MSIX_ENTRY_BYTES = 16
MSIX_VECTORS_MOST = 2048


class Offset(IntEnum):
    """Where things are in the configuration space."""

    VENDOR = 0x00
    DEVICE = 0x02
    COMMAND = 0x04
    STATUS = 0x06
    REVISION = 0x08
    CLASS = 0x09
    CACHE_LINE = 0x0C
    LATENCY = 0x0D
    BARS = 0x10
    SUBSYSTEM_VENDOR = 0x2C
    SUBSYSTEM = 0x2E
    CAPABILITIES = 0x34
    INTERRUPT_LINE = 0x3C
    # The capabilities, where we put them.
    POWER = 0x40
    MSIX = 0x50
    EXPRESS = 0x60


_COMMAND_WRITABLE = 0x0546  # memory, bus master, parity, SERR#, interrupt disable
_STATUS_CAPABILITIES = 1 << 4
_BAR_64_BIT = 0x4
_FLR = 1 << 15  # Initiate Function Level Reset, in Device Control


class PciConfig:
    """Configuration space of a controller, as bytes that can be read and written.

    Parameters
    ----------
    bar0_nbytes
        Size of BAR0, a power of two.
    vectors
        MSI-X vectors, 1 to 2048.
    on_reset
        Called when a function-level reset is asked for, before the space itself is reset.
    vendor_id, device_id
        The default is of the range that QEMU keeps for experiments (1AF4h, 10F0h to 10FFh): nobody's device has it, so
        no kernel has workarounds for it.
    """

    def __init__(
        self,
        bar0_nbytes: int,
        vectors: int,
        on_reset: Callable[[], None] = lambda: None,
        *,
        vendor_id: int = 0x1AF4,
        device_id: int = 0x10F0,
    ) -> None:
        if bar0_nbytes < 4096 or bar0_nbytes & (bar0_nbytes - 1):
            raise ValueError(f"BAR0 cannot have {bar0_nbytes} bytes: it needs a power of two, at least 4096")
        if not 1 <= vectors <= MSIX_VECTORS_MOST:
            raise ValueError(f"{vectors} MSI-X vectors: there can be 1 to {MSIX_VECTORS_MOST}")
        self.vectors = vectors
        self._on_reset = on_reset
        self._initial = bytearray(CONFIG_BYTES)
        self._writable = bytearray(CONFIG_BYTES)
        self._put(Offset.VENDOR, 2, vendor_id)
        self._put(Offset.DEVICE, 2, device_id)
        self._put(Offset.COMMAND, 2, 0, _COMMAND_WRITABLE)
        self._put(Offset.STATUS, 2, _STATUS_CAPABILITIES)
        self._put(Offset.CLASS, 3, CLASS_NVME)
        self._put(Offset.CACHE_LINE, 1, 0, 0xFF)
        self._put(Offset.SUBSYSTEM_VENDOR, 2, vendor_id)
        self._put(Offset.SUBSYSTEM, 2, device_id)
        self._put(Offset.INTERRUPT_LINE, 1, 0, 0xFF)  # and no pin: MSI-X only
        # A BAR's size is what its lowest writable bit says: drivers write ones and read back. BAR1 is BAR0's high half.
        self._put(Offset.BARS, 8, _BAR_64_BIT, -bar0_nbytes & (1 << 64) - 1)
        self._put(Offset.BARS + 4 * MSIX_BAR, 4, 0, -MSIX_BAR_BYTES & 0xFFFF_FFFF)
        self._put(Offset.CAPABILITIES, 1, Offset.POWER)
        self._add_power()
        self._add_msix()
        self._add_express()
        self._bytes = bytearray(self._initial)

    def _put(self, offset: int, nbytes: int, value: int, writable: int = 0) -> None:
        self._initial[offset : offset + nbytes] = value.to_bytes(nbytes, "little")
        self._writable[offset : offset + nbytes] = writable.to_bytes(nbytes, "little")

    def _add_power(self) -> None:
        at = Offset.POWER
        self._put(at, 2, Offset.MSIX << 8 | 0x01)
        self._put(at + 2, 2, 0x0003)  # version 1.2; D0 and D3hot only, no power management events
        self._put(at + 4, 2, 0x0008, 0x0003)  # power state; bit 3: going back to D0 resets nothing

    def _add_msix(self) -> None:
        at = Offset.MSIX
        self._put(at, 2, Offset.EXPRESS << 8 | 0x11)
        self._put(at + 2, 2, self.vectors - 1, 0xC000)  # enable, mask all
        self._put(at + 4, 4, MSIX_BAR)
        self._put(at + 8, 4, MSIX_PBA | MSIX_BAR)

    def _add_express(self) -> None:
        at = Offset.EXPRESS
        self._put(at, 2, 0x10)  # the last capability
        self._put(at + 2, 2, 0x0002)  # version 2, endpoint
        self._put(at + 4, 4, 1 << 28 | 1 << 15)  # Device Capabilities: function-level reset, role-based errors
        self._put(at + 8, 2, 0x2810, 0x7FFF)  # Device Control: relaxed ordering, no snoop, reads of 512 bytes
        self._put(at + 12, 4, 4 << 4 | 3)  # Link Capabilities: 4 lanes, 8 GT/s
        self._put(at + 16, 2, 0, 0x01C3)  # Link Control: ASPM, common clock, extended synch
        self._put(at + 18, 2, 4 << 4 | 3)  # Link Status: the same
        self._put(at + 40, 2, 0, 0x001F)  # Device Control 2: completion timeout
        self._put(at + 44, 4, 0b111 << 1)  # Link Capabilities 2: 2.5, 5 and 8 GT/s
        self._put(at + 48, 2, 3, 0x000F)  # Link Control 2: target speed

    def read(self, offset: int, nbytes: int) -> bytes:
        """Bytes of the space.

        Raises
        ------
        ValueError
            If they are outside of it.
        """
        self._check(offset, nbytes)
        return bytes(self._bytes[offset : offset + nbytes])

    def write(self, offset: int, data: bytes) -> None:
        """Change what can be changed.

        Raises
        ------
        ValueError
            If it is outside of the space.
        """
        self._check(offset, len(data))
        for at, new in enumerate(data, offset):
            mask = self._writable[at]
            self._bytes[at] = self._bytes[at] & ~mask | new & mask
        control = Offset.EXPRESS + 8
        flr_byte = control + 1 - offset
        if 0 <= flr_byte < len(data) and data[flr_byte] & _FLR >> 8:
            self._on_reset()
            self.reset()

    def reset(self) -> None:
        """Everything as it was at the start."""
        self._bytes[:] = self._initial

    def _check(self, offset: int, nbytes: int) -> None:
        if offset < 0 or nbytes < 0 or offset + nbytes > CONFIG_BYTES:
            raise ValueError(f"bytes {offset} to {offset + nbytes} are outside of the configuration space")
