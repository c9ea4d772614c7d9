"""The messages of vfio-user, as bytes: QEMU's docs/interop/vfio-user.rst, version 0.1 of the protocol.

Every message is a header of 16 bytes and a payload, whose form the command decides: VERSION's is here, those of the
other commands are in `payloads`. Numbers have the byte order of the
host, which is little-endian on all machines that this builds for. Descriptors travel beside a message (SCM_RIGHTS).

What is taken apart here comes from another process and may be anything: every length is checked, and whatever does not
fit is a `ProtocolError`.
"""

from __future__ import annotations

import json
import struct
from enum import IntEnum, IntFlag
from typing import NamedTuple, Self

MAJOR, MINOR = 0, 1
DEFAULT_MAX_DATA = 1 << 20
"""Most bytes of one read or write where the other side does not say (max_data_xfer_size)."""
DEFAULT_MAX_MAPS = 65535
MAX_FDS = 16
"""Most descriptors that we take in one message; QEMU 10.1 refuses servers that say more."""
MAX_MESSAGE = DEFAULT_MAX_DATA + 4096
"""No message that we take is longer."""
_MAX_VERSION_DATA = 4096


class ProtocolError(Exception):
    """The other side does not keep to the protocol."""


class Command(IntEnum):
    """What a message is about. DMA_READ and DMA_WRITE are sent by servers, all others by clients."""

    VERSION = 1
    DMA_MAP = 2
    DMA_UNMAP = 3
    DEVICE_GET_INFO = 4
    DEVICE_GET_REGION_INFO = 5
    DEVICE_GET_REGION_IO_FDS = 6
    DEVICE_GET_IRQ_INFO = 7
    DEVICE_SET_IRQS = 8
    REGION_READ = 9
    REGION_WRITE = 10
    DMA_READ = 11
    DMA_WRITE = 12
    DEVICE_RESET = 13


def command_name(command: int) -> str:
    """What a command is called in messages to people."""
    return Command(command).name if command in Command.__members__.values() else f"command {command}"


class HeaderFlag(IntFlag):
    """Flags of a header; bits 3:0 are the type, 0 command or 1 reply."""

    REPLY = 0x1
    TYPE = 0xF
    NO_REPLY = 0x10
    ERROR = 0x20


class Header(NamedTuple):
    """What every message begins with. ``size`` counts the header too; ``error`` is an errno or 0."""

    id: int
    command: int
    size: int
    flags: int = 0
    error: int = 0

    def pack(self) -> bytes:
        """The 16 bytes."""
        return _HEADER.pack(*self)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Take the 16 bytes apart; refuse sizes and types that no message has."""
        header = cls(*_HEADER.unpack(data))
        if not HEADER_BYTES <= header.size <= MAX_MESSAGE:
            raise ProtocolError(f"a message says that it has {header.size} bytes")
        if header.flags & HeaderFlag.TYPE > HeaderFlag.REPLY:
            raise ProtocolError(f"a message is neither a command nor a reply (flags {header.flags:#x})")
        return header


_HEADER = struct.Struct("<HHIII")
HEADER_BYTES = _HEADER.size

# ---- VERSION


class Capabilities(NamedTuple):
    """What a side can do, as it says in VERSION; the defaults hold where it says nothing."""

    max_msg_fds: int = 1
    max_data_xfer_size: int = DEFAULT_MAX_DATA
    max_dma_maps: int = DEFAULT_MAX_MAPS
    pgsizes: int = 4096


class Version(NamedTuple):
    """Payload of VERSION: the version spoken and capabilities. ``named`` are those that were said, not defaulted."""

    major: int
    minor: int
    capabilities: Capabilities = Capabilities()
    named: frozenset[str] = frozenset()

    def pack(self) -> bytes:
        """The payload, with the capabilities in ``named``."""
        said = {name: value for name, value in self.capabilities._asdict().items() if name in self.named}
        text = json.dumps({"capabilities": said}, separators=(",", ":")).encode() + b"\0"
        return _VERSION.pack(self.major, self.minor) + text

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Take the payload apart. Capabilities that we do not know are passed over."""
        if len(data) < _VERSION.size:
            raise ProtocolError(f"VERSION has at least {_VERSION.size} bytes, not {len(data)}")
        major, minor = _VERSION.unpack_from(data)
        said = _parse_capabilities(data[_VERSION.size :])
        return cls(major, minor, Capabilities(**said), frozenset(said))


_VERSION = struct.Struct("<HH")


def _parse_capabilities(data: bytes) -> dict[str, int]:
    if not data:
        return {}  # optional
    if len(data) > _MAX_VERSION_DATA or data[-1] != 0:
        raise ProtocolError("VERSION's capabilities are too long or do not end with NUL")
    try:
        top = json.loads(data[:-1].decode()) if data != b"\0" else {}
    except (ValueError, RecursionError):
        raise ProtocolError("VERSION's capabilities are not JSON") from None
    inner = top.get("capabilities", {}) if isinstance(top, dict) else None
    if not isinstance(inner, dict):
        raise ProtocolError("VERSION's capabilities are not an object")
    said = {name: inner[name] for name in Capabilities._fields if name in inner}
    for name, value in said.items():
        if type(value) is not int or not 0 <= value < 1 << 64:
            raise ProtocolError(f"VERSION's capability {name} is not a number that it can be")
    return said
