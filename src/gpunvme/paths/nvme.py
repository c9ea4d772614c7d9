"""The ``nvme`` path: blocks of a namespace, by the user-space driver's own queues."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Protocol, TypeGuard

import numpy as np
from numpy.typing import NDArray

from gpunvme import _native
from gpunvme.errors import RangeError, SpanError
from gpunvme.memory import Buffer, Device, Span, address_of
from gpunvme.paths.base import OpenMovement, Order, Part, Source, Verdict
from gpunvme.transfer import Movement, Report

if TYPE_CHECKING:
    from gpunvme.nvme.namespace import Namespace


_TELLING_SECONDS = 0.01  # a shorter transfer says nothing about speed


class NamespaceSource:
    """A namespace as a range of bytes.

    Parameters
    ----------
    namespace
        Whose blocks they are.
    writable
        Whether it was opened for writing.
    owned
        Whether the controller is closed with it.

    Attributes
    ----------
    on_close
        What a path keeps for it, let go of before the controller.
    writes_catalog
        Whether who writes is a catalog's writer, who looks after what is there.
    """

    is_block_device = True

    def __init__(self, namespace: Namespace, *, writable: bool, owned: bool) -> None:
        self.namespace = namespace
        self.writable = writable
        self._owned = owned
        self.on_close = ExitStack()
        self.writes_catalog = False

    def size(self) -> int:
        """Bytes in the namespace."""
        return self.namespace.size

    def fileno(self) -> int:
        """There is none.

        Raises
        ------
        ValueError
            Always.
        """
        raise ValueError(f"{self.namespace.name} is driven by this process: it has no file descriptor")

    def reserve(self, offset: int, nbytes: int) -> None:
        """Check that a range can be written.

        Raises
        ------
        RangeError
            If it is not inside the namespace.
        SpanError
            If it is not made of whole blocks.
        UnsafeDeviceError
            If the namespace holds data that nobody said may be overwritten.
        """
        block = self.namespace.block_size
        if offset + nbytes > self.size():
            raise RangeError(
                f"{self.namespace.name} has {self.size()} bytes; bytes {offset} to {offset + nbytes} were to be written"
            )
        if offset % block or nbytes % block:
            raise SpanError(
                f"{self.namespace.name} is written in whole blocks of {block} bytes; {nbytes} bytes at {offset} are not"
            )
        self.namespace.check_writable(catalog=self.writes_catalog)

    def flush(self) -> None:
        """Wait until what was written is on the medium."""
        self.namespace.flush()

    def close(self) -> None:
        """Let go of what paths keep for it; close the controller, if it was opened for this source alone."""
        try:
            self.on_close.close()
        finally:
            if self._owned:
                self.namespace.controller.close()


class NvmePath:
    """Raw namespaces only: whole drives that were taken from the kernel, or that it never had."""

    name = "nvme"

    def __init__(self) -> None:
        self._speeds: weakref.WeakKeyDictionary[Namespace, dict[tuple[Device, bool], float]] = (
            weakref.WeakKeyDictionary()
        )

    def verdict(self, source: Source, device: Device) -> Verdict:
        """Say whether it is a namespace, and whether the device is there."""
        if not isinstance(source, NamespaceSource):
            return Verdict(self.name, False, "a file of the kernel's; raw namespaces are opened as nvme+URI")
        controller = source.namespace.controller
        how = f"{len(controller.io_queues)} queues of {controller.transport.uri}"
        if not device.is_gpu:
            direct = controller.transport.maps_any_memory
            return Verdict(self.name, True, how + ("" if direct else "; through memory of the driver's own"))
        missing = _native.cuda_unavailable_reason()
        if missing:
            return Verdict(self.name, False, missing)
        count = len(_native.cuda_devices())
        if device.index >= count:
            return Verdict(self.name, False, f"there is no {device}: the driver sees {count} GPU(s)")
        return Verdict(self.name, True, how + "; through page-locked host memory and the copy engine")

    def speed(self, source: Source, device: Device, *, gather: bool = False) -> float | None:
        """Bytes per second of the last large transfer, or gather, between this namespace and the device."""
        if not isinstance(source, NamespaceSource):
            return None
        return self._speeds.get(source.namespace, {}).get((device, gather))

    def begin(self, order: Order) -> OpenMovement:
        """Begin a transfer."""
        return NamespacesMovement(order, self.name, lambda source: DriverMovement(self, source.namespace, order))

    def note_speed(self, namespace: Namespace, device: Device, speed: float, *, gather: bool) -> None:
        """Remember how fast a transfer was."""
        self._speeds.setdefault(namespace, {})[device, gather] = speed


class OneNamespace(Movement, Protocol):
    """What moves the bytes of one namespace."""

    def add_part(self, offset: int, span: Span) -> None:
        """Add a range of bytes."""

    def add_gather(self, offsets: NDArray[np.int64], nbytes: int, span: Span) -> None:
        """Add small reads, packed in order into ``span``; ``offsets`` is kept by the caller."""

    def begin(self) -> None:
        """Begin what was added, where that does not wait for `seal`."""

    def seal(self) -> None:
        """Say that nothing more comes."""


class DriverMovement:
    """Bytes of one namespace on their way, by the driver's own queues."""

    def __init__(self, path: NvmePath, namespace: Namespace, order: Order) -> None:
        from gpunvme.nvme import spec
        from gpunvme.nvme.movement import NvmeMovement

        opcode = spec.NvmOpcode.WRITE if order.write else spec.NvmOpcode.READ
        self._path = path
        self._order = order
        self._movement = movement = NvmeMovement(namespace, opcode, 0, order)
        self._namespace = namespace
        self._block = namespace.block_size
        self._ranged = self._gathered = self._noted = False
        self.seal, self.cancel, self.expire = movement.seal, movement.cancel, movement.expire
        self.failure, self.report = movement.failure, movement.report

    def add_part(self, offset: int, span: Span) -> None:
        """Add a range of bytes."""
        self._ranged = True
        lba, before = divmod(offset, self._block)
        after = -(before + span.nbytes) % self._block
        if before or after:
            # What else is in the first and the last block is read, too, into memory that nobody looks at.
            unwanted = Buffer.empty(before).span, Buffer.empty(after).span
            self._movement.keep(unwanted)
            self._movement.add_pieces(lba, [unwanted[0], span, unwanted[1]])
        else:
            self._movement.add_range(lba, span)

    def add_gather(self, offsets: NDArray[np.int64], nbytes: int, span: Span) -> None:
        """Add small reads, packed in order into ``span``."""
        if nbytes % self._block or np.any(offsets % self._block):
            for i, at in enumerate(offsets):
                self.add_part(int(at), span.part(i * nbytes, nbytes))
        else:
            lbas = offsets // self._block
            self._movement.keep(lbas)
            self._movement.add_blocks(address_of(lbas), len(lbas), nbytes // self._block, span)
        self._gathered = True

    def begin(self) -> None:
        """Nothing moves before all was added."""

    def wait(self, seconds: float) -> bool:
        """Wait for the end at most so long."""
        done = self._movement.wait(seconds)
        if done and not self._noted and self._movement.failure() is None and not self._order.write:
            self._noted = True
            now = self._movement.report()
            if self._ranged != self._gathered and now.seconds > _TELLING_SECONDS:
                speed = now.moved_bytes / now.seconds
                self._path.note_speed(self._namespace, self._order.device, speed, gather=self._gathered)
        return done


class NamespacesMovement:
    """One transfer between memory and the bytes of one or more namespaces.

    Parameters
    ----------
    order
        What holds for the whole of it.
    path
        Name of the path.
    begin_one
        Makes the movement of one namespace.
    """

    def __init__(self, order: Order, path: str, begin_one: Callable[[NamespaceSource], OneNamespace]) -> None:
        self._order = order
        self._path = path
        self._begin_one = begin_one
        self._by_namespace: dict[Namespace, OneNamespace] = {}
        self._sealed = False

    def _of(self, source: Source) -> OneNamespace:
        if not isinstance(source, NamespaceSource):
            raise SpanError("files and namespaces cannot be parts of one transfer")
        movement = self._by_namespace.get(source.namespace)
        if movement is None:
            movement = self._by_namespace[source.namespace] = self._begin_one(source)
        return movement

    def add(self, parts: Sequence[Part]) -> None:
        """Add ranges to be moved."""
        for source, offset, span in parts:
            self._of(source).add_part(offset, span)
        for movement in self._by_namespace.values():
            movement.begin()

    def add_gather(self, file: Source, offsets: NDArray[np.int64], nbytes: int, span: Span) -> None:
        """Add small reads; ``offsets`` is kept by the caller until the transfer is done."""
        self._of(file).add_gather(offsets, nbytes, span)

    def seal(self) -> None:
        """Say that nothing more comes."""
        self._sealed = True
        for movement in self._by_namespace.values():
            movement.seal()

    def wait(self, seconds: float) -> bool:
        """Wait for the end at most so long."""
        done = self._sealed
        for movement in self._by_namespace.values():
            done &= movement.wait(seconds)
        return done

    def cancel(self) -> None:
        """Stop as soon as possible."""
        for movement in self._by_namespace.values():
            movement.cancel()

    def expire(self) -> None:
        """Stop as soon as possible, for the deadline has passed."""
        for movement in self._by_namespace.values():
            movement.expire()

    def failure(self) -> Exception | None:
        """Why it failed, or None."""
        return next((failure for each in self._by_namespace.values() if (failure := each.failure()) is not None), None)

    def report(self) -> Report:
        """What was done so far."""
        reports = [movement.report() for movement in self._by_namespace.values()]
        if len(reports) == 1:
            return reports[0]
        return Report(
            self._path,
            "; ".join(report.reason for report in reports) or "nothing was moved",
            max((report.seconds for report in reports), default=0.0),
            direct_bytes=sum(report.direct_bytes for report in reports),
            bounced_bytes=sum(report.bounced_bytes for report in reports),
        )


def open_namespace(source: str | Namespace, mode: str) -> NamespaceSource:
    """Open ``nvme+URI?nsid=…`` as bytes, or use a namespace that is open already.

    Raises
    ------
    ValueError
        For mode ``"w"``: a namespace cannot be emptied.
    NvmeError
        If the controller cannot be opened, or has no such namespace.
    """
    if mode == "w":
        raise ValueError("a namespace is neither created nor emptied: use mode 'r' or 'r+'")
    if not isinstance(source, str):
        return NamespaceSource(source, writable=mode == "r+", owned=False)
    from gpunvme import nvme
    from gpunvme.nvme.uri import split_source

    uri, nsid = split_source(source)
    controller = nvme.open(uri)
    try:
        return NamespaceSource(controller.namespace(nsid), writable=mode == "r+", owned=True)
    except BaseException:
        controller.close()
        raise


def is_namespace(source: Any) -> TypeGuard[str | Namespace]:
    """Whether `open_namespace` is for it."""
    if isinstance(source, str | bytes | os.PathLike | int):
        return isinstance(source, str) and source.startswith("nvme+")
    from gpunvme.nvme.namespace import Namespace

    return isinstance(source, Namespace)
