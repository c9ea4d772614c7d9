"""What a way to a controller has to offer, and the ways that there are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from gpunvme.nvme.dma import DmaMemory
from gpunvme.nvme.gpu_memory import GpuAccess
from gpunvme.nvme.uri import Uri, parse_uri


class Transport(Protocol):
    """One way to one controller: its registers, its doorbells, and memory that it can reach.

    Attributes
    ----------
    uri
        What it was opened by.
    doorbells
        Address in this process of the doorbells (BAR0 + 0x1000), or None where they can only be written as registers.
    doorbells_nbytes
        How much of them is mapped there.
    maps_any_memory
        Whether `map` works: the controller can be given any memory of this process.
    bounce_below
        Transfers of fewer bytes are not worth mapping their memory: they pass through memory that is mapped already.
    gpu_access
        Whether the controller reaches GPU memory, and why not. Where it does, this is a `GpuTransport`, too.
    """

    uri: str
    doorbells: int | None
    doorbells_nbytes: int
    maps_any_memory: bool
    bounce_below: int
    gpu_access: GpuAccess

    def read_register(self, offset: int, nbytes: int) -> int:
        """Read 4 or 8 bytes of BAR0."""

    def write_register(self, offset: int, nbytes: int, value: int) -> None:
        """Write 4 or 8 bytes of BAR0."""

    def allocate(self, nbytes: int) -> DmaMemory:
        """New memory that the controller can reach, zeroed, starting at a page."""

    def map(self, address: int, nbytes: int, writable: bool = True) -> DmaMemory:
        """Let the controller reach whole pages of this process's memory, until `DmaMemory.close`.

        ``writable``: it may write there, too.
        """

    def reset(self) -> None:
        """Reset the function, as far as the way allows it."""

    def close(self) -> None:
        """Let go of the controller. From here on it can reach no memory of ours."""


@runtime_checkable
class InterruptTransport(Transport, Protocol):
    """One that passes a controller's interrupts on to who wants them. The driver itself polls."""

    @property
    def interrupt_vectors(self) -> int:
        """How many MSI-X vectors there are."""

    def set_interrupts(self, events: Sequence[int]) -> None:
        """Signal eventfds, those of vectors 0, 1, …; the other vectors, and with none all, are switched off."""


def connect(uri: str | Uri) -> Transport:
    """Open the way to a controller that a URI names.

    Raises
    ------
    UriError
        If the URI cannot be understood.
    TransportError, FileError
        If the controller cannot be reached.
    """
    uri = parse_uri(uri) if isinstance(uri, str) else uri
    if uri.scheme == "soft":
        from gpunvme.nvme.soft import SoftTransport

        return SoftTransport(uri)
    if uri.scheme == "vfio-user":
        from gpunvme.nvme.vfio_user import VfioUserTransport

        return VfioUserTransport(uri.path)
    if uri.scheme == "kmod":
        from gpunvme.nvme.kmod import KmodTransport

        return KmodTransport(uri.path)
    from gpunvme.nvme.vfio import VfioTransport

    return VfioTransport(uri.path, noiommu=uri.options.get("noiommu", False), prefer=uri.options.get("via", "auto"))
