"""GPU memory that a controller reaches by itself: what a transport says about it, and what it hands out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NoReturn, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from gpunvme.nvme.dma import DmaMemory

# GPUs map their memory into the PCIe address space, and export it, in pages of this size.
GPU_PAGE = 64 << 10


@dataclass(frozen=True, slots=True)
class GpuAccess:
    """Whether a controller reaches GPU memory.

    Attributes
    ----------
    kind
        ``"none"``; ``"direct"``: it writes there by itself, over PCIe; ``"emulated"``: somebody copies for it, which
        shows that code is right, and nothing of how fast it is.
    reason
        Why not, or how.
    """

    kind: Literal["none", "emulated", "direct"]
    reason: str


class GpuDmaMemory(DmaMemory):
    """GPU memory that a controller reaches: ``address`` is the GPU's, and the host cannot look at it.

    Parameters
    ----------
    address
        Of the first byte on the GPU, a multiple of `GPU_PAGE`.
    nbytes
        Size in bytes, a multiple of `GPU_PAGE`.
    device
        Number of the GPU.
    iovas, release
        As for `DmaMemory`; where IOVAs are several ranges, one for each 4096 bytes.
    """

    def __init__(
        self,
        address: int,
        nbytes: int,
        device: int,
        iovas: int | NDArray[np.uint64],
        release: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(address, nbytes, iovas, release)
        self.device = device

    def view(self, offset: int = 0, nbytes: int | None = None) -> NoReturn:
        """There is none."""
        raise TypeError(f"this memory is on cuda:{self.device}: the host reaches it by copies")


@runtime_checkable
class GpuTransport(Protocol):
    """A transport whose `gpu_access` is not ``"none"``."""

    def map_gpu(self, address: int, nbytes: int, device: int, writable: bool = True) -> GpuDmaMemory:
        """Let the controller reach GPU memory, until `GpuDmaMemory.close`, which waits for accesses in flight.

        Parameters
        ----------
        address, nbytes
            Multiples of `GPU_PAGE`, within one allocation of ``cuMemAlloc``. It stays allocated until after the close.
        device
            Number of the GPU that it is on.
        writable
            Whether the controller may write there.

        Raises
        ------
        TransportError, CudaError
            If it cannot be mapped.
        """


def check_gpu_pages(address: int, nbytes: int) -> None:
    """Raise ValueError unless memory is whole pages of a GPU."""
    if address % GPU_PAGE or nbytes % GPU_PAGE or nbytes <= 0:
        raise ValueError(f"GPU memory is mapped in whole pages of {GPU_PAGE} bytes, not {nbytes} bytes at {address:#x}")
