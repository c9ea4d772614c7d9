"""A checkpoint opened for tensors one at a time, with the face of the safetensors library's ``safe_open``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

from gpunvme import file as files
from gpunvme.errors import FormatError
from gpunvme.models import frameworks, header, slicing
from gpunvme.models.index import Entry
from gpunvme.models.safetensors import load_entries


class _Handle:
    """An open file shared by a `safe_open` and the slices taken from it; closed with the last of them."""

    def __init__(self, filename: str) -> None:
        self.file = files.open(filename)

    def __del__(self) -> None:
        file = getattr(self, "file", None)  # opening may have failed
        if file is not None:
            file.close()


class safe_open:  # noqa: N801 - the name that users of the safetensors library know
    """Open one safetensors file. Only its header is read; tensors are read when asked for.

    Parameters
    ----------
    filename
        The file.
    framework
        ``"pt"`` for torch tensors, ``"np"`` for numpy arrays; None is torch where it is installed.
    device
        Where tensors shall be, as for `load_file`.

    Raises
    ------
    FormatError
        The file is not a valid checkpoint.
    FileError
        The file is missing or cannot be read.
    SpanError
        ``framework="np"`` and a device other than the host.

    Examples
    --------
    >>> with gpunvme.safe_open("model.safetensors", framework="pt", device="cuda:0") as f:  # doctest: +SKIP
    ...     embedding = f.get_tensor("embedding")
    ...     rows = f.get_slice("head.weight")[:1024]
    """

    def __init__(self, filename: str | os.PathLike[str], framework: str | None = None, device: Any = "cpu") -> None:
        self._adapter = frameworks.choose(framework, device)
        self._filename = os.fspath(filename)
        self._handle: _Handle | None = _Handle(self._filename)
        file = self._handle.file
        self._header = header.read(file.fileno(), file.size, self._filename)

    def keys(self) -> list[str]:
        """Return the names of the tensors, sorted."""
        return sorted(self._open()[1].tensors)

    def offset_keys(self) -> list[str]:
        """Return the names of the tensors in the order of the file's bytes."""
        return list(self._open()[1].tensors)

    def metadata(self) -> dict[str, str] | None:
        """Return the file's free-form text, or None where it has none."""
        metadata = self._open()[1].metadata
        return None if metadata is None else dict(metadata)

    def get_tensor(self, name: str) -> Any:
        """Read one tensor.

        Raises
        ------
        FormatError
            The file holds no tensor of this name, or the framework lacks its dtype.
        """
        return load_entries([self._entry(name)], self._adapter)[name]

    def get_tensors(self) -> dict[str, Any]:
        """Read every tensor, in one movement. Returns ``{name: tensor}`` in the order of the file's bytes."""
        handle, contents = self._open()
        entries = [Entry(handle.file, self._filename, info) for info in contents.tensors.values()]
        return load_entries(entries, self._adapter)

    def get_slice(self, name: str) -> SafeSlice:
        """Return an object whose shape and dtype can be asked, and which is read by indexing it.

        Raises
        ------
        FormatError
            The file holds no tensor of this name.
        """
        return SafeSlice(self._open()[0], self._entry(name), self._adapter)

    def __contains__(self, name: object) -> bool:
        return name in self._open()[1].tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self._open()[1].tensors)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._handle = None

    def _open(self) -> tuple[_Handle, header.Header]:
        if self._handle is None:
            raise FormatError("the checkpoint is closed", filename=self._filename)
        return self._handle, self._header

    def _entry(self, name: str) -> Entry:
        handle, contents = self._open()
        info = contents.tensors.get(name)
        if info is None:
            raise FormatError("the file does not contain this tensor", filename=self._filename, tensor=name)
        return Entry(handle.file, self._filename, info)


class SafeSlice:
    """One tensor of an open checkpoint, read by indexing. Stays usable after its `safe_open` is closed."""

    def __init__(self, handle: _Handle, entry: Entry, adapter: frameworks.Framework) -> None:
        self._handle = handle  # keeps the file open
        self._entry = entry
        self._adapter = adapter

    def get_shape(self) -> list[int]:
        """Return the shape of the whole tensor, in elements."""
        return list(self._entry.info.shape)

    def get_dtype(self) -> str:
        """Return the dtype of the whole tensor as the file names it, e.g. ``"BF16"``."""
        return self._entry.info.dtype.name

    def __getitem__(self, index: Any) -> Any:
        """Read a part of the tensor into memory of its own.

        Integers, slices with a positive step, an ellipsis, None and tuples of them read little more than the bytes
        asked for. Lists, masks and arrays read the whole tensor and leave the indexing to the framework.

        Raises
        ------
        IndexError
            An integer is out of range, or there are more indices than dimensions.
        ValueError
            A slice's step is not positive.
        FormatError
            The framework lacks the dtype; or the tensor is packed (F4) and the index asks for less than all of it.
        """
        info = self._entry.info
        selection = slicing.parse(index, info.shape)
        if selection is None or info.dtype.bits < 8:
            if selection is not None and selection != slicing.parse(..., info.shape):
                raise FormatError(
                    f"{info.dtype.name} packs several elements into a byte and is read as a whole",
                    filename=self._entry.filename,
                    tensor=info.name,
                )
            tensor = load_entries([self._entry], self._adapter)[info.name]
            return tensor if selection is not None else tensor[index]
        return slicing.read(self._entry, selection, self._adapter)
