"""What torch.save wrote, loaded straight to where its tensors go."""

from __future__ import annotations

import io
import itertools
import os
import pickle
import weakref
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

import torch

from gpunvme.errors import FormatError, PathError, file_error
from gpunvme.file import File
from gpunvme.many import read_many
from gpunvme.torch.archive import Stored, find_records
from gpunvme.torch.saving import STORAGE_TYPES

MapLocation: TypeAlias = str | torch.device | Mapping[str, str | torch.device] | None


def load(path: str | os.PathLike[str], map_location: MapLocation = None, *, weights_only: bool = True) -> Any:
    """Load what `save` or `torch.save` wrote; the bytes of its tensors are read straight to their device.

    Parameters
    ----------
    path
        The file.
    map_location
        A device for all tensors, or a device for each one that they were saved from, such as ``{"cuda:1": "cuda:0"}``;
        if None, where they were.
    weights_only
        As for `torch.load`: whether only tensors and plain types are allowed. Without it a file can run any program.

    Raises
    ------
    FormatError
        If it is no such file, or a damaged one.
    pickle.UnpicklingError
        If it holds what ``weights_only`` does not allow.
    PathError
        If tensors were saved from a GPU that is not here; ``map_location`` says where to put them.
    FileError, CudaError
        If it cannot be read; if the GPU cannot be used.
    """
    name = os.fspath(path)
    try:
        fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise file_error(error, "cannot open", name) from None
    try:
        records = find_records(fd, name)
        wanted = _storages(os.pread(fd, records["data.pkl"].nbytes, records["data.pkl"].at), records, name)
        with File(fd, "r", name=name) as file:
            ready = _read(file, wanted, map_location)
        return _unpickle(fd, name, wanted, ready, map_location, weights_only)
    finally:
        os.close(fd)


class _Wanted(NamedTuple):
    """A storage, in the order in which torch.load asks for it."""

    key: str
    location: str
    nbytes: int
    at: int


def _storages(data: bytes, records: Mapping[str, Stored], filename: str) -> list[_Wanted]:
    """Find out which storages a pickle asks for, without running anything that it names."""
    scanner = _Scanner(io.BytesIO(data))
    try:
        scanner.load()
    except _BROKEN as error:
        raise FormatError(f"record 'data.pkl' cannot be understood: {error!r}", filename=filename) from None
    wanted: list[_Wanted] = []
    known: dict[str, int] = {}
    for key, location, nbytes in scanner.asked:
        record = records.get(f"data/{key}")
        if record is None:
            raise FormatError(f"there is no record 'data/{key}'", filename=filename)
        if nbytes > record.nbytes:
            raise FormatError(
                f"a tensor's storage has {nbytes} bytes, its record 'data/{key}' has {record.nbytes}", filename=filename
            )
        if known.setdefault(key, nbytes) != nbytes:
            raise FormatError(f"record 'data/{key}' is said to have two sizes", filename=filename)
        wanted.append(_Wanted(key, location, nbytes, record.at))
    return wanted


# What a pickle that is not one makes the unpickler raise (Python's documentation of pickle, "UnpicklingError").
_BROKEN = (
    pickle.UnpicklingError,
    ArithmeticError,
    AttributeError,
    EOFError,
    ImportError,
    IndexError,
    KeyError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)


class _Anything:
    """Stands for whatever a pickle names; takes what is done to it, and does nothing."""

    name = ""

    def __new__(cls, *_: Any, **__: Any) -> _Anything:
        return object.__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __call__(self, *_: Any, **__: Any) -> _Anything:
        return self

    def __setstate__(self, _: Any) -> None:
        pass

    def __setitem__(self, _: Any, __: Any) -> None:
        pass

    def append(self, _: Any) -> None:
        """Take an item of a list."""

    def extend(self, _: Any) -> None:
        """Take items of a list."""

    def add(self, _: Any) -> None:
        """Take an item of a set."""


_SIZES = {name: dtype.itemsize for name, dtype in STORAGE_TYPES.items()} | {"UntypedStorage": 1}


class _Scanner(pickle.Unpickler):
    """Reads a pickle for the storages that it asks for."""

    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream, encoding="utf-8", errors="surrogateescape")
        self.asked: list[tuple[str, str, int]] = []

    def find_class(self, module: str, name: str) -> Any:
        return type(name, (_Anything,), {"name": name if module in ("torch", "torch.storage") else ""})

    def persistent_load(self, saved: Any) -> Any:
        word, kind, key, location, numel = saved[:5]
        if word != "storage" or not isinstance(key, str) or not isinstance(location, str):
            raise ValueError(f"persistent id {saved!r}")
        if not isinstance(numel, int) or numel < 0:
            raise ValueError(f"a storage of {numel!r} elements")
        self.asked.append((key, location, numel * _SIZES[kind.name]))
        return _Anything()


def _read(file: File, wanted: list[_Wanted], map_location: MapLocation) -> dict[str, torch.UntypedStorage]:
    """Allocate every storage where it goes and read them, each device's as one transfer."""
    ready: dict[str, torch.UntypedStorage] = {}
    groups: dict[torch.device, list[tuple[File, int, torch.Tensor]]] = {}
    for each in wanted:
        if each.key in ready:
            continue
        device = _device(each.location, map_location)
        memory = torch.empty(each.nbytes, dtype=torch.uint8, device=device)
        ready[each.key] = memory.untyped_storage()
        if each.nbytes:
            groups.setdefault(memory.device, []).append((file, each.at, memory))
    for parts in groups.values():
        read_many(parts, total=sum(len(memory) for _, _, memory in parts))
    return ready


def _device(location: str, map_location: MapLocation) -> torch.device:
    where: str | torch.device
    if isinstance(map_location, Mapping):
        where = map_location.get(location, location)
    elif map_location is None:
        where = location
    elif isinstance(map_location, (str, torch.device)):
        where = map_location
    else:
        raise TypeError(f"map_location must be a device or a mapping of devices, not a {type(map_location).__name__}")
    try:
        device = torch.device(where)
    except RuntimeError:
        raise FormatError(f"a tensor was saved from {location!r}, which is no device") from None
    if device.type not in ("cpu", "cuda"):
        raise PathError(f"tensors go to the CPU or a GPU, not to {device}: use map_location")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise PathError(
            f"a tensor saved from {location!r} goes to {device}, and there are {torch.cuda.device_count()} GPUs here: "
            "use map_location='cpu', or another GPU"
        )
    return device


class _Places(dict[Any, Any]):
    """What `torch.load` is given as its ``map_location``: every storage is already where it goes.

    A function would do for storages. But tensors that are made of others (wrapper subclasses, such as those of
    quantised weights) have a device besides, and of what is mapped PyTorch then takes a mapping, and no function. So
    each storage is said to go to a place of its own kind, for which `_placed` is registered.

    Parameters
    ----------
    wanted
        Storages in the order in which PyTorch asks for them: for each once, unless it has no bytes.
    ready
        They themselves.
    map_location
        The caller's.
    """

    def __init__(
        self, wanted: list[_Wanted], ready: Mapping[str, torch.UntypedStorage], map_location: MapLocation, name: str
    ) -> None:
        super().__init__()
        self._order = iter(wanted)
        self._ready = ready
        self._map_location = map_location
        self._name = name
        self._given: set[str] = set()
        self._tag = f"{_PLACED}{next(_numbers)}:"
        _placing[self._tag] = self

    def get(self, key: Any, default: Any = None) -> Any:
        """Return where a storage, by its location, or a tensor, by its device, goes."""
        if not isinstance(key, torch.device):
            return f"{self._tag}{key}"
        mapped = self._map_location
        if isinstance(mapped, Mapping):
            return mapped.get(str(key), key)
        return key if mapped is None else mapped

    def place(self, nbytes: int, location: str) -> torch.UntypedStorage:
        """Return the storage that PyTorch asks for now."""
        each = next((each for each in self._order if each.key not in self._given), None)
        if each is None or (each.location, each.nbytes) != (location, nbytes):
            raise FormatError("PyTorch asks for other storages than the archive names", filename=self._name)
        if each.nbytes:
            self._given.add(each.key)
        return self._ready[each.key]


_PLACED = "gpunvme-placed-"
_numbers = itertools.count()
_placing: weakref.WeakValueDictionary[str, _Places] = weakref.WeakValueDictionary()


def _placed(storage: torch.UntypedStorage, location: str) -> torch.UntypedStorage | None:
    """Give `torch.load` a storage that `_Places` named."""
    if not location.startswith(_PLACED):
        return None
    tag, _, saved_from = location.partition(":")
    return _placing[f"{tag}:"].place(storage.nbytes(), saved_from)


# Behind PyTorch's own, which have 10 to 23 and know no such location.
torch.serialization.register_package(1000, lambda storage: None, _placed)


def _unpickle(
    fd: int,
    name: str,
    wanted: list[_Wanted],
    ready: Mapping[str, torch.UntypedStorage],
    map_location: MapLocation,
    weights_only: bool,
) -> Any:
    """Let torch.load build the object around the storages, which are full already.

    It maps the file (mmap=True), so that it reads nothing but the pickle.
    """
    places = _Places(wanted, ready, map_location, name)
    try:
        loaded = torch.load(f"/proc/self/fd/{fd}", map_location=places, weights_only=weights_only, mmap=True)
    except RuntimeError as error:
        if "PytorchStreamReader" not in str(error):
            raise
        raise FormatError(str(error).partition("\n")[0], filename=name) from None
    for each in wanted:
        # PyTorch makes memory that can grow as large as a tensor says that it is; what is added is anything.
        if ready[each.key].nbytes() != each.nbytes:
            raise FormatError(
                f"a tensor reaches beyond its storage, record 'data/{each.key}' of {each.nbytes} bytes", filename=name
            )
    return loaded
