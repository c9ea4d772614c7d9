"""Memory that both a controller and a GPU reach: the host's, or the GPU's own."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gpunvme.errors import TransportError
from gpunvme.gpu.driver import Gpu
from gpunvme.gpu.registration import registrations
from gpunvme.memory import address_of
from gpunvme.nvme.dma import PAGE, DmaMemory, allocate_aligned, page_range
from gpunvme.nvme.gpu_memory import GPU_PAGE, GpuTransport

if TYPE_CHECKING:
    from gpunvme.nvme.controller import Controller


class SharedMemory(Protocol):
    """What both kinds offer.

    Attributes
    ----------
    memory
        The controller's view of it.
    gpu_address
        Its address for kernels.
    """

    memory: DmaMemory
    gpu_address: int

    def zero(self) -> None:
        """Zero it, while neither uses it."""

    def write(self, content: NDArray[Any]) -> None:
        """Fill its beginning, while neither uses it."""

    def close(self) -> None:
        """Take it away from both, and free it. Only when neither uses it."""


class HostMemory:
    """Host memory that both a controller and a GPU reach.

    Parameters
    ----------
    gpu
        The GPU.
    memory
        The controller's view of it; closed with this.
    """

    def __init__(self, gpu: Gpu, memory: DmaMemory) -> None:
        self.memory = memory
        self._start, nbytes = page_range(memory.address, memory.nbytes)
        try:
            base = registrations.add(gpu, self._start, nbytes, may_be_io=False)
        except BaseException:
            memory.close()
            raise
        self.gpu_address = base + memory.address - self._start

    def zero(self) -> None:
        """Zero it."""
        ctypes.memset(self.memory.address, 0, self.memory.nbytes)

    def write(self, content: NDArray[Any]) -> None:
        """Fill its beginning."""
        self.memory.view(0, content.nbytes)[:] = content.reshape(-1).view(np.uint8).data

    def close(self) -> None:
        """Take it away from the GPU, then from the controller."""
        registrations.remove(self._start)
        self.memory.close()


class GpuResidentMemory:
    """GPU memory that a controller reaches.

    Parameters
    ----------
    gpu
        The GPU.
    transport
        Of the controller.
    nbytes
        How much.
    stream
        For what the host has to do with it.
    """

    def __init__(self, gpu: Gpu, transport: GpuTransport, nbytes: int, stream: int) -> None:
        self._gpu = gpu
        self._stream = stream
        size = -(-nbytes // GPU_PAGE) * GPU_PAGE
        self._allocated = gpu.allocate(size + GPU_PAGE)
        self.gpu_address = -(-self._allocated // GPU_PAGE) * GPU_PAGE
        try:
            self.memory: DmaMemory = transport.map_gpu(self.gpu_address, size, gpu.index)
        except BaseException:
            gpu.free(self._allocated)
            raise

    def zero(self) -> None:
        """Zero it, and wait for that."""
        self._gpu.fill(self.gpu_address, self.memory.nbytes, self._stream)
        self._gpu.synchronize(self._stream)

    def write(self, content: NDArray[Any]) -> None:
        """Fill its beginning, and wait for that."""
        host, _ = self._gpu.allocate_host(content.nbytes)
        try:
            ctypes.memmove(host, address_of(content), content.nbytes)
            self._gpu.to_gpu(self.gpu_address, host, content.nbytes, self._stream)
            self._gpu.synchronize(self._stream)
        finally:
            self._gpu.free_host(host)

    def close(self) -> None:
        """Take it away from the controller, then free it."""
        self.memory.close()
        allocated, self._allocated = self._allocated, 0
        if allocated:
            self._gpu.free(allocated)


class SharedAllocator:
    """Hands out memory where a placement wants it.

    Parameters
    ----------
    gpu, controller
        Who shares it.
    placement
        ``"host"``, ``"data"`` or ``"full"``.
    stream
        For what the host has to do with GPU memory.
    """

    def __init__(self, gpu: Gpu, controller: Controller, placement: str, stream: int) -> None:
        self._gpu = gpu
        self._controller = controller
        self._placement = placement
        self._stream = stream

    def data(self, nbytes: int) -> SharedMemory:
        """For data and PRP lists: its first byte is at a controller's page."""
        return self._allocate(nbytes, self._placement != "host")

    def queue(self, nbytes: int) -> SharedMemory:
        """For one SQ or CQ, zeroed: besides, its IOVAs are contiguous.

        Raises
        ------
        TransportError
            If they are not.
        """
        memory = self._allocate(nbytes, self._placement == "full")
        try:
            _check_contiguous(memory.memory, nbytes)
            memory.zero()
        except BaseException:
            memory.close()
            raise
        return memory

    def _allocate(self, nbytes: int, on_gpu: bool) -> SharedMemory:
        transport = self._controller.transport
        if not on_gpu:
            return HostMemory(self._gpu, allocate_aligned(transport, nbytes, self._controller.page_bytes))
        if not isinstance(transport, GpuTransport):
            raise TransportError(f"{transport.uri}: {transport.gpu_access.reason}")
        return GpuResidentMemory(self._gpu, transport, nbytes, self._stream)


def _check_contiguous(memory: DmaMemory, nbytes: int) -> None:
    if isinstance(memory.iovas, int):
        return
    pages = memory.iovas[: -(-nbytes // PAGE)]
    if (np.diff(pages) != PAGE).any():
        raise TransportError(
            f"a queue of {nbytes} bytes does not fit into one range of IOVAs of this memory; ask for fewer entries by "
            "depth="
        )
