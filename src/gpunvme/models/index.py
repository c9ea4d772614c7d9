"""Which files make up a checkpoint, and which of them holds which tensor."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from gpunvme import file as files
from gpunvme.errors import FileError, FormatError, MissingFileError
from gpunvme.models import gguf_header, header
from gpunvme.models.header import MAX_HEADER_BYTES, TensorInfo

#: What `load_file` takes as its source.
Source = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

_PART = re.compile(r"(?P<stem>.*)-(?P<number>\d+)-of-(?P<count>\d+)\.(?:safetensors|gguf)")


class Entry(NamedTuple):
    """One tensor of a checkpoint: the open file that holds it, that file's name, and where and what it is."""

    file: files.File
    filename: str
    info: TensorInfo


class Checkpoint:
    """The open files of a checkpoint and every tensor in them. A context manager.

    Parameters
    ----------
    source
        As for `load_file`.
    path
        Name of the path that must carry every transfer, as for `gpunvme.open`.

    Attributes
    ----------
    tensors
        ``{name: entry}``, ordered by file and by offset within the file.
    """

    def __init__(self, source: Source, path: str = "auto") -> None:
        paths, weight_map, index = _resolve(source)
        self._forced = path
        self.tensors: dict[str, Entry] = {}
        self.filenames = paths
        self._files: list[files.File] = []
        try:
            for name in self.filenames:
                self._add(name, index)
        except BaseException:
            self.close()
            raise
        if weight_map is not None:
            _compare(weight_map, self.tensors, index)

    def _add(self, path: str, index: str | None) -> None:
        if index is not None and not os.path.exists(path):
            raise MissingFileError(errno.ENOENT, f"a shard that the index {index!r} names does not exist", path)
        file = files.open(path, path=self._forced)
        self._files.append(file)
        for name, info in _tensors(file, path).items():
            if name in self.tensors:
                other = self.tensors[name].filename
                raise FormatError(f"the tensor is in {other!r} as well", filename=path, tensor=name)
            self.tensors[name] = Entry(file, path, info)

    def select(self, keys: Iterable[str] | None, predicate: Callable[[str], bool] | None) -> list[Entry]:
        """Return the wanted tensors in the order of the files.

        Raises
        ------
        FormatError
            A key names no tensor.
        """
        wanted = self.tensors.keys() if keys is None else _names(keys)
        for name in wanted:
            if name not in self.tensors:
                raise FormatError(
                    f"no such tensor among the {len(self.tensors)} in {', '.join(self.filenames) or 'no file'}",
                    tensor=name,
                )
        return [
            entry for name, entry in self.tensors.items() if name in wanted and (predicate is None or predicate(name))
        ]

    def close(self) -> None:
        """Close every file."""
        while self._files:
            self._files.pop().close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _tensors(file: files.File, filename: str) -> dict[str, TensorInfo]:
    """Every tensor of one file, by the header that the file begins with."""
    descriptor, size = file.fileno(), file.size
    if filename.endswith(".gguf") or gguf_header.is_gguf(descriptor, filename):
        return gguf_header.read(descriptor, size, filename).tensors
    return header.read(descriptor, size, filename).tensors


def _names(keys: Iterable[str]) -> dict[str, None]:
    if isinstance(keys, str):
        raise TypeError(f"keys= takes an iterable of names, not the single string {keys!r}")
    return dict.fromkeys(keys)


def _resolve(source: Source) -> tuple[list[str], dict[str, str] | None, str | None]:
    """Return the files of a source, and if an index named them its tensor -> file map and its own name."""
    if not isinstance(source, str | os.PathLike):
        return [os.fspath(path) for path in source], None, None
    path = Path(source)
    if path.is_dir():
        path = _in_directory(path)
        if path.is_dir():
            return [str(shard) for shard in _all_shards(path)], None, None
    elif path.suffix != ".json":
        return [os.fspath(source)], None, None
    if path.suffix != ".json":
        return [str(path)], None, None
    weight_map = _weight_map(path)
    shards = dict.fromkeys(weight_map.values())
    return [str(path.parent / shard) for shard in shards], weight_map, str(path)


def _in_directory(directory: Path) -> Path:
    """Return what to load from a directory: a file, an index, or the directory itself for all shards in it."""
    for name in ("model.safetensors", "model.safetensors.index.json"):  # the names and the order of transformers
        if (directory / name).is_file():
            return directory / name
    indexes = sorted(directory.glob("*.safetensors.index.json"))
    if len(indexes) > 1:
        raise FormatError(
            f"the directory has {len(indexes)} indexes ({', '.join(path.name for path in indexes)}): name one of them",
            filename=str(directory),
        )
    return indexes[0] if indexes else directory


def _all_shards(directory: Path) -> list[Path]:
    paths = sorted(directory.glob("*.safetensors")) or sorted(directory.glob("*.gguf"))
    if not paths:
        raise MissingFileError(errno.ENOENT, "no *.safetensors and no *.gguf in this directory", str(directory))
    parts: dict[tuple[str, str], set[int]] = {}
    for path in paths:
        if match := _PART.fullmatch(path.name):
            parts.setdefault((match["stem"], match["count"]), set()).add(int(match["number"]))
    for (stem, count), numbers in parts.items():
        if len(numbers) != int(count):  # without an index, a missing shard would go unnoticed
            raise FormatError(
                f"{len(numbers)} of the {int(count)} shards {stem}-*-of-{count}{paths[0].suffix} are there",
                filename=str(directory),
            )
    return paths


def _weight_map(path: Path) -> dict[str, str]:
    """Read an index: ``{"weight_map": {tensor: shard}}``, each shard a name beside the index."""
    filename = str(path)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            keys = [key for key, _ in pairs]
            raise FormatError(
                "the index has a key twice", filename=filename, tensor=next(key for key in keys if keys.count(key) > 1)
            )
        return found

    try:
        with path.open("rb") as stream:
            raw = stream.read(MAX_HEADER_BYTES + 1)
    except OSError as error:
        kind = MissingFileError if isinstance(error, FileNotFoundError) else FileError
        raise kind(error.errno or 0, error.strerror or str(error), filename) from error
    if len(raw) > MAX_HEADER_BYTES:
        raise FormatError(f"the index is over the limit of {MAX_HEADER_BYTES} bytes", filename=filename)
    try:
        content = json.loads(raw, object_pairs_hook=unique)
    except FormatError:
        raise
    except (ValueError, RecursionError) as error:
        raise FormatError(
            f"the index is not JSON: {error}", filename=filename, offset=getattr(error, "pos", None)
        ) from None
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict):
        raise FormatError("the index has no object weight_map", filename=filename)
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not shard or "\0" in shard:
            raise FormatError(f"weight_map names no file but {shard!r}", filename=filename, tensor=name)
        if Path(shard).is_absolute() or ".." in Path(shard).parts:
            raise FormatError(
                f"the shard {shard!r} lies outside the directory of the index", filename=filename, tensor=name
            )
    return weight_map


def _compare(weight_map: dict[str, str], tensors: dict[str, Entry], index: str | None) -> None:
    directory = Path(index or "").parent
    for name, shard in weight_map.items():
        if name not in tensors or tensors[name].filename != str(directory / shard):
            raise FormatError(f"the index says {shard!r}, which does not hold it", filename=index, tensor=name)
    for name, entry in tensors.items():
        if name not in weight_map:
            raise FormatError(f"the tensor is in {entry.filename!r} but not in the index", filename=index, tensor=name)
