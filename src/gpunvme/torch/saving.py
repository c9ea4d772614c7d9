"""State dicts written as torch.save writes them, straight from where their tensors are."""

from __future__ import annotations

import io
import os
import pickle
import sys
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from gpunvme import many
from gpunvme.errors import FormatError, SpanError
from gpunvme.file import File
from gpunvme.replace import Replacement
from gpunvme.torch.archive import Layout, Record

# torch.load(weights_only=True) reads this protocol and no other.
_PROTOCOL = 2
# Bytes of GPU memory that are brought to the host at a time for their checksum.
_PIECE = 64 << 20


def save(obj: Any, path: str | os.PathLike[str], *, fsync: bool = True, crc32: bool | None = None) -> None:
    """Save an object as `torch.save` does; the bytes of its tensors go straight from their memory to the file.

    The file is written beside its final name and takes that name once all of it is there: a reader sees the old file or
    the new one. `torch.load` reads it, with ``weights_only=True`` and ``mmap=True`` too, and so does `load`.

    Parameters
    ----------
    obj
        Such as ``model.state_dict()``: anything that can be pickled, with tensors on the CPU and on GPUs. Tensors that
        share storage share it when they are loaded; of a view the whole storage is saved, as `torch.save` does it.
    path
        The file to write or replace.
    fsync
        Whether it is on the drive when this returns.
    crc32
        Whether the archive's checksums are computed, as unzip and Python's zipfile want them; PyTorch does not look at
        them. Costs reading all tensors once more, those on a GPU through host memory. If None, what
        `torch.serialization.get_crc32_options` says.

    Raises
    ------
    SpanError
        A tensor is on another kind of device, has no memory, or shares memory with one of another dtype.
    pickle.PicklingError, AttributeError, TypeError
        Something cannot be pickled.
    FileError
        The file could not be written.
    """
    stream = io.BytesIO()
    pickler = _Pickler(stream)
    pickler.dump(obj)
    small = {
        "data.pkl": stream.getvalue(),
        "byteorder": sys.byteorder.encode(),
    }
    layout = Layout()
    heads: list[tuple[Record, bytes]] = [(layout.add(name, len(data)), data) for name, data in small.items()]
    bodies = [(layout.add(f"data/{key}", len(body)), body) for key, body in pickler.bodies()]
    heads.append((layout.add("version", 2), b"3\n"))  # of the archive's format, in PyTorch's caffe2/serialize
    if crc32 is None:
        # PyTorch before 2.6 has no such option, and computes them.
        crc32 = getattr(torch.serialization, "get_crc32_options", lambda: True)()
    with Replacement(path, sync=fsync) as replacement:
        _write(replacement.file, layout, heads, bodies, crc32)


def _write(
    file: File,
    layout: Layout,
    small: list[tuple[Record, bytes]],
    bodies: list[tuple[Record, torch.Tensor]],
    crc32: bool,
) -> None:
    groups: dict[torch.device, list[tuple[File, int, Any]]] = {}
    for record, body in bodies:
        if record.nbytes:
            groups.setdefault(body.device, []).append((file, record.at, body))
    for device in groups:
        if device.type == "cuda":
            # The checksums' threads have streams of their own.
            torch.cuda.current_stream(device).synchronize()
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        # Largest first: the last ones to be ready are then small. Results are taken below, in order.
        summed = [pool.submit(_crc32_of, body) if crc32 else None for _, body in bodies]
        try:
            for parts in groups.values():
                many.write_parts(parts)
            for (record, _), result in zip(bodies, summed, strict=True):
                record.crc = 0 if result is None else result.result()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    for record, data in small:
        record.crc = zlib.crc32(data)
    pieces = [*layout.heads(), *((record.at, data) for record, data in small), (layout.end, layout.directory())]
    many.write_parts([(file, at, data) for at, data in pieces])


def _crc32_of(body: torch.Tensor) -> int:
    crc = 0
    for begin in range(0, len(body), _PIECE):
        crc = zlib.crc32(body[begin : begin + _PIECE].cpu().numpy(), crc)
    return crc


class _Pickler(pickle.Pickler):
    """Writes for each storage ``("storage", type, key, location, numel)``, which is what torch.load looks for."""

    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream, protocol=_PROTOCOL)
        self._keys: dict[tuple[Any, ...], str] = {}
        self._dtypes: dict[tuple[torch.device, int], torch.dtype] = {}
        self._storages: list[torch.UntypedStorage] = []

    def persistent_id(self, obj: Any) -> tuple[str, type, str, str, int] | None:
        if isinstance(obj, torch.storage.TypedStorage):
            storage, dtype = obj._untyped_storage, obj.dtype
            kind: type = _storage_type(dtype)
        elif isinstance(obj, torch.UntypedStorage):
            storage, dtype, kind = obj, torch.uint8, torch.UntypedStorage
        else:
            return None
        device = storage.device
        if device.type not in ("cpu", "cuda"):
            raise SpanError(f"a tensor is on {device}; what is saved must be on the CPU or a GPU")
        nbytes = storage.nbytes()
        address = storage.data_ptr()
        if nbytes:
            known = self._dtypes.setdefault((device, address), dtype)
            if known != dtype:
                raise SpanError(
                    f"tensors of {known} and {dtype} share memory, which the format cannot tell: save a .clone()"
                )
        # Storages of no bytes have no address to be known by, but each is itself.
        identity = (device, address, nbytes) if nbytes else (id(storage), len(self._storages))
        key = self._keys.get(identity)
        if key is None:
            key = self._keys[identity] = str(len(self._storages))
            self._storages.append(storage)
        location = "cpu" if device.type == "cpu" else f"cuda:{device.index}"
        return ("storage", kind, key, location, nbytes // dtype.itemsize)

    def bodies(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield each storage's key and bytes, as a tensor where they are."""
        for number, storage in enumerate(self._storages):
            yield str(number), torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _storage_type(dtype: torch.dtype) -> type:
    name = next((name for name, known in STORAGE_TYPES.items() if known == dtype), None)
    if name is None:
        raise FormatError(f"torch.save has no storage for {dtype}")
    kind: type = getattr(torch, name)
    return kind


#: What stands in the pickle for a storage of each type: classes of torch's, by their names.
STORAGE_TYPES: dict[str, torch.dtype] = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
    "QUInt8Storage": torch.quint8,
    "QInt8Storage": torch.qint8,
    "QInt32Storage": torch.qint32,
    "QUInt4x2Storage": torch.quint4x2,
    "QUInt2x4Storage": torch.quint2x4,
}
