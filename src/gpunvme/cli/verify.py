"""Tensors compared with those of the safetensors library, bit by bit."""

from __future__ import annotations

import importlib
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from gpunvme.cli.exits import CheckFailedError, NotInstalledError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


@dataclass(frozen=True)
class Comparison:
    """How much was compared."""

    tensors: int
    nbytes: int

    def as_dict(self) -> dict[str, int]:
        """Return it for ``--json``."""
        return asdict(self)


def compare_with_safetensors(
    checkpoint: str,
    tensors: Mapping[str, Any],
    *,
    dtype: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Load a checkpoint again with the safetensors library and compare every bit.

    Parameters
    ----------
    checkpoint
        What was loaded.
    tensors
        What came of it: torch tensors or numpy arrays, all of one kind.
    dtype
        What floating tensors were converted to, or None.
    progress
        Called with the bytes compared and the bytes of the checkpoint.

    Raises
    ------
    CheckFailedError
        Names, shapes, types or bits differ, or the library cannot load the checkpoint.
    NotInstalledError
        The safetensors library is missing.
    """
    try:
        safetensors = importlib.import_module("safetensors")
    except ModuleNotFoundError as error:
        raise NotInstalledError("--verify compares with the safetensors library: pip install safetensors") from error
    from gpunvme.models.index import Checkpoint

    with Checkpoint(checkpoint) as opened:
        filenames, expected = opened.filenames, set(opened.tensors)
        total = sum(entry.info.nbytes for entry in opened.tensors.values())
    if expected != set(tensors):
        different = ", ".join(sorted(expected ^ set(tensors))[:5])
        raise CheckFailedError(f"other tensors were loaded than the checkpoint has: {different}")
    torch = next((type(tensor).__module__.startswith("torch") for tensor in tensors.values()), False)
    equal = _equal_torch if torch else _equal_numpy
    done = 0
    for filename in filenames:
        with safetensors.safe_open(filename, framework="pt" if torch else "np") as file:
            for name in file.keys():  # noqa: SIM118 - the handle is no mapping
                try:
                    reference = file.get_tensor(name)
                except (TypeError, AttributeError, safetensors.SafetensorError) as error:
                    raise CheckFailedError(f"the safetensors library cannot load {name!r}: {error}") from error
                if not equal(tensors[name], reference, dtype):
                    raise CheckFailedError(f"{name!r} in {filename!r} differs from what the safetensors library loads")
                done += reference.nbytes
                if progress is not None:
                    progress(done, total)
    return Comparison(len(tensors), done)


def _equal_torch(tensor: Any, reference: Any, dtype: str | None) -> bool:
    torch: Any = importlib.import_module("torch")
    reference = reference.to(tensor.device)
    if dtype is not None and reference.is_floating_point():
        reference = reference.to(tensor.dtype)
    if tensor.dtype != reference.dtype or tensor.shape != reference.shape:
        return False
    bits = [part.contiguous().view(-1).view(torch.uint8) for part in (tensor, reference)]
    return bool(torch.equal(*bits))


def _equal_numpy(tensor: Any, reference: Any, dtype: str | None) -> bool:
    numpy: Any = importlib.import_module("numpy")
    # Kind "V" are the small floats of ml_dtypes.
    if dtype is not None and reference.dtype.kind in "fV":
        reference = reference.astype(tensor.dtype)
    if tensor.dtype != reference.dtype or tensor.shape != reference.shape:
        return False
    bits = [numpy.ascontiguousarray(part).reshape(-1).view(numpy.uint8) for part in (tensor, reference)]
    return bool(numpy.array_equal(*bits))
