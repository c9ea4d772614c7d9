"""The archive of torch.save: a ZIP file of stored records under one directory, found and laid out.

PKWARE's APPNOTE (4.3.7 local file header, 4.3.12 central directory, 4.3.14 to 4.3.16 its ends, 4.5.3 ZIP64) and
PyTorch's notes on serialization: ``data.pkl``, ``byteorder``, ``version``; ``data/0``, ``data/1`` … for the storages.
"""

from __future__ import annotations

import os
import struct
import sys
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from gpunvme.errors import FormatError

ROOT = "archive"
#: Where storages begin: PyTorch's own alignment; large ones on a page, so that they are written O_DIRECT as they lie.
ALIGNMENT = 64
PAGE = 4096
LARGE = 64 << 10

_LOCAL = struct.Struct("<IHHHHHIIIHH")
_CENTRAL = struct.Struct("<IHHHHHHIIIHHHHHII")
_END64 = struct.Struct("<IQHHIIQQQQ")
_LOCATOR = struct.Struct("<IIQI")
_END = struct.Struct("<IHHHHIIH")
_MOST = 0xFFFFFFFF  # in a field of 32 bits: the number is in the ZIP64 extra field
FROM_64 = _MOST  # sizes and offsets from which on it is there
_DATE = 1 << 5 | 1  # 1 January 1980: the same content makes the same file
_PADDING_ID = 0x4246  # an extra field that every reader skips


@dataclass
class Record:
    """One record to be written; ``at`` is where its bytes go, ``header`` where what is before them begins."""

    name: str
    nbytes: int
    header: int
    at: int
    crc: int = 0


@dataclass
class Layout:
    """Where each record of a new archive goes."""

    records: list[Record] = field(default_factory=list)
    end: int = 0

    def add(self, name: str, nbytes: int) -> Record:
        """Place the next record."""
        alignment = PAGE if nbytes >= LARGE else ALIGNMENT
        path = f"{ROOT}/{name}"
        fixed = _LOCAL.size + len(path.encode()) + _extra64_size(nbytes)
        # The padding is an extra field, which has a head of 4 bytes itself.
        at = -(-(self.end + fixed + 4) // alignment) * alignment
        record = Record(path, nbytes, self.end, at)
        self.records.append(record)
        self.end = at + nbytes
        return record

    def heads(self) -> Iterator[tuple[int, bytes]]:
        """Yield what goes before each record's bytes, and where; the checksums must be known."""
        for record in self.records:
            name = record.name.encode()
            size = _MOST if _extra64_size(record.nbytes) else record.nbytes
            extra = struct.pack("<HHQQ", 1, 16, record.nbytes, record.nbytes) if size == _MOST else b""
            padding = record.at - record.header - _LOCAL.size - len(name) - len(extra) - 4
            extra += struct.pack("<HH", _PADDING_ID, padding) + bytes(padding)
            version = 45 if size == _MOST else 20
            head = _LOCAL.pack(0x04034B50, version, 0x0800, 0, 0, _DATE, record.crc, size, size, len(name), len(extra))
            yield record.header, head + name + extra

    def directory(self) -> bytes:
        """Return the central directory and the ends of the archive, which go to ``end``."""
        entries = b"".join(map(_entry, self.records))
        count, size = len(self.records), len(entries)
        end64 = _END64.pack(0x06064B50, _END64.size - 12, 45, 45, 0, 0, count, count, size, self.end)
        locator = _LOCATOR.pack(0x07064B50, 0, self.end + size, 1)
        few = min(count, 0xFFFF)
        end = _END.pack(0x06054B50, 0, 0, few, few, min(size, _MOST), min(self.end, _MOST), 0)
        return entries + end64 + locator + end


def _extra64_size(nbytes: int) -> int:
    return 20 if nbytes >= FROM_64 else 0


def _entry(record: Record) -> bytes:
    name = record.name.encode()
    large = bool(_extra64_size(record.nbytes))
    values = [record.nbytes] * 2 if large else []
    far = record.header >= FROM_64
    values += [record.header] if far else []
    extra = struct.pack(f"<HH{len(values)}Q", 1, 8 * len(values), *values) if values else b""
    size = _MOST if large else record.nbytes
    version = 45 if values else 20
    head = _CENTRAL.pack(
        0x02014B50,
        version,
        version,
        0x0800,
        0,
        0,
        _DATE,
        record.crc,
        size,
        size,
        len(name),
        len(extra),
        0,
        0,
        0,
        0,
        _MOST if far else record.header,
    )
    return head + name + extra


class Stored(NamedTuple):
    """A record of an archive that exists: its first byte and its size."""

    at: int
    nbytes: int


def find_records(fd: int, filename: str) -> Mapping[str, Stored]:
    """Find the records of an archive, by their names below its directory.

    Raises
    ------
    FormatError
        If it is no archive of torch.save, if it is damaged, or if it is of another byte order.
    """
    size = os.fstat(fd).st_size
    with open(os.dup(fd), "rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                entries = archive.infolist()
        except (zipfile.BadZipFile, NotImplementedError, EOFError, struct.error, ValueError) as error:
            raise FormatError(
                f"no archive of torch.save ({error}); a file of its old format can be read by torch.load only",
                filename=filename,
            ) from None
    root = entries[0].filename.split("/", 1)[0] + "/" if entries else ""
    records: dict[str, Stored] = {}
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            raise FormatError(f"record {entry.filename!r} is compressed or encrypted", filename=filename)
        head = os.pread(fd, _LOCAL.size, entry.header_offset)
        if len(head) != _LOCAL.size or not head.startswith(b"PK\3\4"):
            raise FormatError(f"record {entry.filename!r} has no header", filename=filename, offset=entry.header_offset)
        *_, name_bytes, extra_bytes = _LOCAL.unpack(head)
        at = entry.header_offset + _LOCAL.size + name_bytes + extra_bytes
        if at + entry.file_size > size:
            raise FormatError(f"record {entry.filename!r} ends beyond the file", filename=filename, offset=at)
        records[entry.filename.removeprefix(root)] = Stored(at, entry.file_size)
    for needed in ("data.pkl", "version"):
        if needed not in records and f".data/{needed}" not in records:
            raise FormatError(f"no archive of torch.save: it has no record {needed!r}", filename=filename)
    if "constants.pkl" in records:
        raise FormatError("a TorchScript archive; torch.jit.load reads it", filename=filename)
    order = records.get("byteorder")
    if order is not None and os.pread(fd, min(order.nbytes, 16), order.at) != sys.byteorder.encode():
        raise FormatError(f"its bytes are not in this machine's order, {sys.byteorder}", filename=filename)
    return records
