"""The safetensors library's own loading functions, replaced by gpunvme's and put back.

Libraries such as transformers and diffusers take them by ``from safetensors import safe_open``, so the functions
stand under names in many modules. Every module-level name in every loaded module that is one of the originals is
replaced, and at the end every one that is a replacement is put back, also in modules loaded in between. References
kept elsewhere (default arguments, class attributes, closures) are not touched.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

from gpunvme.errors import FormatError
from gpunvme.models import opening
from gpunvme.models.safetensors import load_file

_lock = threading.Lock()
_replacements: list[_Replacements] = []  # the one in force, if any
_in_force = 0  # patches that have not ended


class Patch:
    """A patch in force. `undo` or leaving it as a context manager ends it; the last one to end restores the library."""

    def __init__(self) -> None:
        self._ended = False

    def undo(self) -> None:
        """End this patch. Doing so twice is harmless."""
        global _in_force
        with _lock:
            if not self._ended:
                self._ended = True
                _in_force -= 1
                if not _in_force:
                    _replacements.pop().restore()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()


def patch_safetensors() -> Patch:
    """Let code that uses the safetensors library load through gpunvme.

    Replaces ``safetensors.safe_open``, ``safetensors.torch.load_file`` and ``safetensors.numpy.load_file`` under
    every module-level name that holds them (see the module's text). Other frameworks than torch and numpy, and other
    devices than the CPU and CUDA, go on to the library as before. Errors are raised as a class that is both a
    `gpunvme.FormatError` and a ``safetensors.SafetensorError``.

    One difference remains: on the CPU, the library maps the file and its tensors are the page cache; gpunvme's own
    their memory.

    Returns
    -------
    Patch
        With ``undo()``, and usable as a context manager. Patches nest; the last one to end restores the library.

    Raises
    ------
    ImportError
        The safetensors library is not installed.

    Examples
    --------
    >>> with gpunvme.patch_safetensors():  # doctest: +SKIP
    ...     model = transformers.AutoModel.from_pretrained(name)
    """
    global _in_force
    with _lock:
        if not _in_force:
            replacements = _Replacements()
            replacements.apply()
            _replacements.append(replacements)
        _in_force += 1
        return Patch()


class _Replacements:
    """Originals and replacements by identity, swapped in whichever modules hold them."""

    def __init__(self) -> None:
        library: Any = importlib.import_module("safetensors")
        error = _error(library.SafetensorError)
        self._pairs: list[tuple[Any, Any]] = [(library.safe_open, _opener(library.safe_open, error))]
        for framework, module in (("pt", "safetensors.torch"), ("np", "safetensors.numpy")):
            if importlib.util.find_spec("torch" if framework == "pt" else "numpy") is not None:
                original = importlib.import_module(module).load_file
                self._pairs.append((original, _loader(original, framework, error)))

    def apply(self) -> None:
        _swap({id(original): replacement for original, replacement in self._pairs})

    def restore(self) -> None:
        _swap({id(replacement): original for original, replacement in self._pairs})


def _swap(by_identity: dict[int, Any]) -> None:
    for module in list(sys.modules.values()):
        names = getattr(module, "__dict__", None)
        if not isinstance(names, dict):
            continue
        for name, value in list(names.items()):
            if id(value) in by_identity:
                names[name] = by_identity[id(value)]


def _error(base: type[Exception]) -> type[FormatError]:
    """Make the error class for callers that catch the library's error."""
    return type(
        "SafetensorFormatError",
        (FormatError, base),
        {"__doc__": "Not a valid checkpoint, for callers of either library.", "__module__": __name__},
    )


@contextmanager
def _as_library(error: type[FormatError]) -> Iterator[None]:
    """Turn gpunvme's errors into what callers of the library expect."""
    try:
        yield
    except FormatError as found:
        translated = error.__new__(error, *found.args)  # the message already says where
        translated.filename, translated.offset, translated.tensor = found.filename, found.offset, found.tensor
        raise translated from found


def _ours(framework: Any, device: Any) -> bool:
    """Whether gpunvme loads this; if not, the library does."""
    if framework not in ("pt", "torch", "pytorch", "np", "numpy"):
        return False
    name = str(device)
    if device is None or name == "cpu":
        return True
    if framework in ("np", "numpy") or not (name.startswith("cuda") or isinstance(device, int)):
        return False
    import torch

    return bool(torch.cuda.is_available())


def _loader(original: Any, framework: str, error: type[FormatError]) -> Any:
    def load(filename: str | os.PathLike[str], device: Any = "cpu", **options: Any) -> dict[str, Any]:
        if not _ours(framework, device):
            return dict(original(filename, device, **options))
        with _as_library(error):
            return load_file([filename], "cpu" if device is None else device, framework=framework)

    load.__name__ = load.__qualname__ = original.__name__
    load.__doc__ = original.__doc__
    load.__module__ = original.__module__
    return load


def _opener(original: Any, error: type[FormatError]) -> Any:
    # A class, because annotations such as "safe_open | None" are evaluated by modules imported while it is in place.
    class safe_open(opening.safe_open):  # noqa: N801
        __doc__ = original.__doc__

        def __new__(cls, filename: Any, framework: Any, device: Any = "cpu", **options: Any) -> Any:
            if not _ours(framework, device):
                return original(filename, framework, device, **options)
            return super().__new__(cls)

        def __init__(self, filename: Any, framework: Any, device: Any = "cpu", **options: Any) -> None:
            with _as_library(error):
                super().__init__(filename, framework, "cpu" if device is None else device)

        def _open(self) -> Any:
            with _as_library(error):
                return super()._open()

        def _entry(self, name: str) -> Any:
            with _as_library(error):
                return super()._entry(name)

    return safe_open
