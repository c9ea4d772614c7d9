"""Asynchronous events (Base 2.0, 5.2)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from gpunvme.nvme.spec.layout import BitFields, bits


class EventType(IntEnum):
    """What an asynchronous event is about."""

    ERROR = 0
    SMART = 1
    NOTICE = 2
    COMMAND_SET = 6
    VENDOR = 7


class ErrorEvent(IntEnum):
    """Information of an event of type ERROR."""

    INVALID_DOORBELL_REGISTER = 0
    """A doorbell of a queue that does not exist was written."""
    INVALID_DOORBELL_VALUE = 1
    """A value outside of the queue, or the one that the doorbell had, was written."""
    DIAGNOSTIC_FAILURE = 2
    PERSISTENT_INTERNAL = 3
    TRANSIENT_INTERNAL = 4
    FIRMWARE_LOAD = 5


_SMART_EVENTS = ("the subsystem's reliability is compromised", "a temperature crossed its threshold", "spare is low")
_NOTICES = {
    0: "namespaces changed",
    1: "new firmware is being activated",
    2: "telemetry is available",
    3: "asymmetric namespace access changed",
}


@dataclass(frozen=True, slots=True)
class AsyncEvent(BitFields):
    """DW0 of an Asynchronous Event Request's completion."""

    type: int = bits(0, 3, required=True)
    information: int = bits(8, 8, required=True)
    log_page: int = bits(16, 8, required=True)
    """The log page to read; reading it makes room for the next event of this type."""

    def __str__(self) -> str:
        text: str | None = None
        if self.type == EventType.ERROR and self.information in ErrorEvent.__members__.values():
            text = ErrorEvent(self.information).name.lower().replace("_", " ")
        elif self.type == EventType.SMART and self.information < len(_SMART_EVENTS):
            text = _SMART_EVENTS[self.information]
        elif self.type == EventType.NOTICE:
            text = _NOTICES.get(self.information)
        return text or f"event of type {self.type}, information {self.information:#x}"
