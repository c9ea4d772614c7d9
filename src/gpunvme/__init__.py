"""Bytes from files and checkpoints into GPU memory and back, by the fastest path that the machine has."""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from gpunvme import errors
from gpunvme.errors import (
    AccessDeniedError,
    BudgetError,
    Cancelled,
    CatalogChangedError,
    CatalogError,
    CommandError,
    ControllerError,
    CudaError,
    CufileError,
    DeadlineExceeded,
    DeviceGoneError,
    Error,
    FileError,
    FormatError,
    LayerError,
    MissingFileError,
    NvmeError,
    PathError,
    RangeError,
    SpanError,
    TierError,
    TierFullError,
    TierNameError,
    TierStateError,
    TierUnavailableError,
    TransportError,
    TruncatedError,
    UnsafeDeviceError,
    UriError,
)
from gpunvme.file import File, open
from gpunvme.many import read_many
from gpunvme.memory import Buffer, Device, Span
from gpunvme.paths.base import Verdict
from gpunvme.totals import stats
from gpunvme.transfer import Transfer

if TYPE_CHECKING:
    from gpunvme import catalog, gpu, nvme, tiers
    from gpunvme import torch as torch
    from gpunvme.catalog import Catalog
    from gpunvme.models.gguf import GgufFile
    from gpunvme.models.layer_sources import LayerSource
    from gpunvme.models.layers import LayerLoader
    from gpunvme.models.opening import safe_open
    from gpunvme.models.patch import patch_safetensors
    from gpunvme.models.safetensors import load_file
    from gpunvme.models.saving import save_file
    from gpunvme.p2pdma.memory import P2pMemory
    from gpunvme.tiers import TierManager

try:
    __version__ = version("gpunvme")
except PackageNotFoundError:  # used from a source tree
    __version__ = "0.0.0"

# Handed out on first use: most programs need only some of them.
_LAZY = {
    "Catalog": "gpunvme.catalog",
    "GgufFile": "gpunvme.models.gguf",
    "LayerLoader": "gpunvme.models.layers",
    "LayerSource": "gpunvme.models.layer_sources",
    "P2pMemory": "gpunvme.p2pdma.memory",
    "TierManager": "gpunvme.tiers",
    "load_file": "gpunvme.models.safetensors",
    "patch_safetensors": "gpunvme.models.patch",
    "safe_open": "gpunvme.models.opening",
    "save_file": "gpunvme.models.saving",
}

# Not torch: `from gpunvme import *` must not hide PyTorch's own name.
__all__ = [
    "AccessDeniedError",
    "BudgetError",
    "Buffer",
    "Cancelled",
    "Catalog",
    "CatalogChangedError",
    "CatalogError",
    "CommandError",
    "ControllerError",
    "CudaError",
    "CufileError",
    "DeadlineExceeded",
    "Device",
    "DeviceGoneError",
    "Error",
    "File",
    "FileError",
    "FormatError",
    "GgufFile",
    "LayerError",
    "LayerLoader",
    "LayerSource",
    "MissingFileError",
    "NvmeError",
    "P2pMemory",
    "PathError",
    "RangeError",
    "Span",
    "SpanError",
    "TierError",
    "TierFullError",
    "TierManager",
    "TierNameError",
    "TierStateError",
    "TierUnavailableError",
    "Transfer",
    "TransportError",
    "TruncatedError",
    "UnsafeDeviceError",
    "UriError",
    "Verdict",
    "__version__",
    "catalog",
    "errors",
    "gpu",
    "load_file",
    "nvme",
    "open",
    "patch_safetensors",
    "read_many",
    "safe_open",
    "save_file",
    "stats",
    "tiers",
]


def __getattr__(name: str) -> Any:
    if name in {"catalog", "gpu", "nvme", "tiers", "torch"}:
        return import_module("gpunvme." + name)
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'gpunvme' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
