"""Log pages: what a controller has to tell about its health, its errors and its firmware.

References are to the NVM Express Base Specification 2.0.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntFlag

from gpunvme.nvme.spec.layout import Bytes, Structure, number, numbers, texts

_KELVIN = 273  # what the specification has temperatures rounded by


class SmartWarning(IntFlag):
    """`SmartLog.critical_warning`."""

    SPARE_LOW = 1 << 0
    TEMPERATURE = 1 << 1
    RELIABILITY_DEGRADED = 1 << 2
    READ_ONLY = 1 << 3
    BACKUP_FAILED = 1 << 4
    PMR_UNRELIABLE = 1 << 5


_WARNINGS = {
    SmartWarning.SPARE_LOW: "available spare is below its threshold",
    SmartWarning.TEMPERATURE: "a temperature is outside of its thresholds",
    SmartWarning.RELIABILITY_DEGRADED: "media errors have degraded reliability",
    SmartWarning.READ_ONLY: "the media is read-only",
    SmartWarning.BACKUP_FAILED: "the volatile memory's backup has failed",
    SmartWarning.PMR_UNRELIABLE: "the persistent memory region is unreliable",
}


@dataclass(frozen=True, slots=True)
class SmartLog(Structure, size=512, name="the SMART / Health Information log"):
    """Log page 02h (5.16.1.3)."""

    critical_warning: int = number(0, 1)
    """Bits of `SmartWarning`; 0 is good. See `warnings`."""
    composite_temperature: int = number(1, 2)
    """Kelvin: see `celsius`."""
    available_spare: int = number(3, 1)
    """Percent."""
    available_spare_threshold: int = number(4, 1)
    """Percent: less spare than this is critical."""
    percentage_used: int = number(5, 1)
    """Of the endurance that the vendor estimates; may exceed 100, ends at 255."""
    endurance_group_critical_warning: int = number(6, 1)
    data_units_read: int = number(32, 16)
    """Thousands of 512 bytes, rounded up: see `bytes_read`."""
    data_units_written: int = number(48, 16)
    """Thousands of 512 bytes, rounded up: see `bytes_written`."""
    host_read_commands: int = number(64, 16)
    host_write_commands: int = number(80, 16)
    controller_busy_time: int = number(96, 16)
    """Minutes with I/O outstanding."""
    power_cycles: int = number(112, 16)
    power_on_hours: int = number(128, 16)
    unsafe_shutdowns: int = number(144, 16)
    """Power lost without a shutdown before."""
    media_errors: int = number(160, 16)
    """Unrecovered data integrity errors."""
    error_log_entries: int = number(176, 16)
    """Over the controller's life."""
    warning_temperature_time: int = number(192, 4)
    """Minutes above WCTEMP."""
    critical_temperature_time: int = number(196, 4)
    """Minutes above CCTEMP."""
    temperature_sensor: tuple[int, ...] = numbers(200, 8, 2)
    """Kelvin; 0: there is no such sensor. See `sensors_celsius`."""
    thermal_management_1_count: int = number(216, 4)
    """Transitions to lower power because of heat, lightly; then heavily."""
    thermal_management_2_count: int = number(220, 4)
    thermal_management_1_time: int = number(224, 4)
    """Seconds in these states."""
    thermal_management_2_time: int = number(228, 4)

    @property
    def warnings(self) -> list[str]:
        """The critical warnings in words."""
        return [text for flag, text in _WARNINGS.items() if self.critical_warning & flag]

    @property
    def celsius(self) -> int | None:
        """The controller's temperature, None if it is not reported."""
        return self.composite_temperature - _KELVIN if self.composite_temperature else None

    @property
    def sensors_celsius(self) -> dict[int, int]:
        """Temperature of each sensor that there is, by its number from 1 on."""
        return {i: kelvin - _KELVIN for i, kelvin in enumerate(self.temperature_sensor, 1) if kelvin}

    @property
    def bytes_read(self) -> int:
        """Bytes that hosts have read, to 512000 bytes."""
        return self.data_units_read * 512_000

    @property
    def bytes_written(self) -> int:
        """Bytes that hosts have written, to 512000 bytes."""
        return self.data_units_written * 512_000


_NOT_OF_ONE = 0xFFFF


@dataclass(frozen=True, slots=True)
class ErrorLogEntry(Structure, size=64, name="an error log entry"):
    """One entry of log page 01h (5.16.1.2)."""

    error_count: int = number(0, 8)
    """Which error of the controller's life this is, from 1 on; 0: the entry is empty."""
    sqid: int = number(8, 2)
    """Submission queue of the command; FFFFh: not the error of one command."""
    cid: int = number(10, 2)
    """Command identifier; FFFFh: not the error of one command."""
    status: int = number(12, 2)
    """As in a completion, the phase tag in bit 0: see `status_field`."""
    parameter_error_location: int = number(14, 2)
    """Bits 7:0 byte, 10:8 bit of the command that is wrong; FFFFh: not the error of one parameter."""
    lba: int = number(16, 8)
    """The first block that is affected."""
    nsid: int = number(24, 4)
    vendor_log_page: int = number(28, 1)
    """The log page with more about it; 0: none."""
    trtype: int = number(29, 1)
    """Transport Type."""
    command_specific: int = number(32, 8)
    transport_specific: int = number(40, 2)

    @property
    def status_field(self) -> int:
        """The 15-bit status."""
        return self.status >> 1

    @property
    def parameter(self) -> tuple[int, int] | None:
        """Byte and bit of the command that are wrong, None if it is not the error of one parameter."""
        if self.parameter_error_location == _NOT_OF_ONE:
            return None
        return self.parameter_error_location & 0xFF, self.parameter_error_location >> 8 & 7


def decode_error_log(data: Bytes) -> list[ErrorLogEntry]:
    """Entries of an error log, the newest first, without the empty ones."""
    data = bytes(data)
    size = ErrorLogEntry.SIZE
    entries = [ErrorLogEntry.decode(data[at : at + size]) for at in range(0, len(data) - size + 1, size)]
    return [entry for entry in entries if entry.error_count]


@dataclass(frozen=True, slots=True)
class FirmwareSlotLog(Structure, size=512, name="the Firmware Slot Information log"):
    """Log page 03h (5.16.1.4)."""

    afi: int = number(0, 1)
    """Active Firmware Info: bits 2:0 slot in use, 6:4 slot after the next reset."""
    frs: tuple[str, ...] = texts(8, 7, 8)
    """Firmware Revision in slots 1 to 7; empty: none."""

    @property
    def active_slot(self) -> int:
        """The slot whose firmware runs."""
        return self.afi & 7

    @property
    def next_slot(self) -> int | None:
        """The slot whose firmware runs after the next reset, None if the controller does not say."""
        return self.afi >> 4 & 7 or None

    @property
    def revisions(self) -> dict[int, str]:
        """Firmware revision in each slot that has one."""
        return {slot: revision for slot, revision in enumerate(self.frs, 1) if revision}
