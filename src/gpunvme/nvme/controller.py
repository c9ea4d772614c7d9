"""`Controller`: one NVMe controller, driven by this process."""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

from gpunvme import _native, nvtx_ranges
from gpunvme.errors import ControllerError, DeadlineExceeded, NvmeError
from gpunvme.memory import CPU, Buffer, Device, Span
from gpunvme.nvme import spec
from gpunvme.nvme.admin import AdminQueue
from gpunvme.nvme.admin_commands import AdminCommands
from gpunvme.nvme.dma import PAGE, DmaMemory, allocate_aligned, io_memory
from gpunvme.nvme.doorbells import Doorbells
from gpunvme.nvme.identify import IdentifyController
from gpunvme.nvme.queues import Guest, IoQueuePair, make_queues, queue_depth
from gpunvme.nvme.registers import Registers
from gpunvme.nvme.transport import Transport, connect

if TYPE_CHECKING:
    from gpunvme.nvme.namespace import Namespace

_ADMIN_DEPTH = 32
# A controller without a limit (MDTS 0) gets commands of at most this many bytes: by then size buys nothing.
_MOST_BYTES = 1 << 20
_STAGING_BYTES = 16 << 20
# I/O queue pairs to ask for at least: their number is fixed once there is one, and guests may want some later.
_QUEUES_ASKED = 32


def open(uri: str, **options: Any) -> Controller:
    """Take a controller over.

    Parameters
    ----------
    uri
        ``soft:FILE?size=64MiB`` or ``soft:ram?size=64MiB``: a software controller in this process;
        ``vfio-user:SOCKET``: a controller that another process serves; ``pci:0000:01:00.0``: a function that is bound
        to vfio-pci.
    options
        As for `Controller`.

    Raises
    ------
    UriError
        If the URI cannot be understood.
    TransportError, FileError
        If the controller cannot be reached.
    ControllerError
        If it does not get ready.
    """
    transport = connect(uri)
    try:
        return Controller(transport, **options)
    except BaseException:
        transport.close()
        raise


class Controller(AdminCommands):
    """An NVMe controller that this process drives. A context manager.

    Parameters
    ----------
    transport
        The way to it; closed with the controller.
    queues
        I/O queue pairs to make. The controller may grant fewer.
    depth
        Entries of each.
    max_bytes
        Largest data transfer of one command; less if the controller's MDTS says so.
    timeout
        Seconds that an I/O command may take before it is aborted.
    admin_timeout
        Seconds that an admin command may take.
    vectors
        Interrupt vectors, those of an `InterruptTransport`, that completions raise: that of I/O queue n is n modulo
        this. Nothing here waits for interrupts; 0: none are raised.
    overwrite
        Name of the transport's device (for ``pci:``, its BDF), to allow writing to a namespace that holds a partition
        table, a file system or a catalog.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        queues: int = 4,
        depth: int = 256,
        max_bytes: int = _MOST_BYTES,
        timeout: float = 10.0,
        admin_timeout: float = 10.0,
        vectors: int = 0,
        overwrite: str | None = None,
    ) -> None:
        if queues < 1 or depth < 2:
            raise ValueError("a controller needs at least one I/O queue of two entries")
        if max_bytes < PAGE or timeout <= 0 or admin_timeout <= 0:
            raise ValueError(f"max_bytes must be at least {PAGE}, and timeouts more than 0")
        registers = Registers(transport)
        self.page_bytes = registers.cap.page_bytes_min
        memory = allocate_aligned(transport, 3 * self.page_bytes, self.page_bytes)
        super().__init__(transport, registers, memory, admin_timeout)
        self.timeout = timeout
        self.overwrite = overwrite
        self._wanted = (queues, depth, max_bytes)
        self._vectors = vectors
        self._process = os.getpid()
        self._lock = threading.RLock()  # one at a time changes queues
        self._pairs: list[IoQueuePair] = []
        self._guests: list[Guest] = []
        self._guest_ids: set[int] = set()
        self._buffers: dict[int, DmaMemory] = {}
        self._namespaces: dict[int, Namespace] = {}
        self._staging: dict[Device, _native.IoStaging] = {}
        self._staging_memory: list[DmaMemory] = []
        self._closed = False
        self._dead: NvmeError | None = None
        self.epoch = 0  # how often the queues were made
        self.resets = 0
        self._page_exponent = registers.cap.mpsmin
        self._doorbells = Doorbells(transport, registers.cap.dstrd, queues + 1)
        try:
            with nvtx_ranges.during(f"{queues} queues made on {transport.uri}"):
                self._bring_up()
        except BaseException:
            self._quiesce()
            raise
        _open_controllers.add(self)

    # --- bringing up and down

    def _bring_up(self) -> None:
        """From any state to ready, with I/O queues."""
        self.registers.disable()
        self._doorbells.forget()
        depth = min(_ADMIN_DEPTH, self.page_bytes // 64)
        self._admin = AdminQueue(self._admin_memory, depth, self.page_bytes, self._doorbells)
        self.registers.enable(
            self._page_exponent, depth, self._admin_memory.iova(), self._admin_memory.iova(self.page_bytes)
        )
        self.info = IdentifyController.decode(self._identify(spec.Cns.CONTROLLER))
        queues, wanted_depth, max_bytes = self._wanted
        self.max_bytes = min(max_bytes, self.info.max_transfer_bytes(self.page_bytes) or max_bytes)
        self._granted = self._set_number_of_queues(max(queues, _QUEUES_ASKED))
        depth = queue_depth(wanted_depth, self.registers.cap.queue_entries, self._admin_memory.contiguous)
        self._pairs = make_queues(min(queues, self._granted), lambda queue_id: self._make_queue(queue_id, depth))
        for guest in self._guests:
            guest.make_queues()
        self.epoch += 1
        self._request_events()

    def _make_queue(self, queue_id: int, depth: int) -> IoQueuePair:
        vector = queue_id % self._vectors if self._vectors else None
        return IoQueuePair(
            queue_id, depth, self.transport, self.command, self._doorbells, self.page_bytes, self.max_bytes, vector
        )

    def _set_number_of_queues(self, queues: int) -> int:
        answer = self.command(
            spec.AdminOpcode.SET_FEATURES, cdw=(spec.Feature.NUMBER_OF_QUEUES, (queues - 1) << 16 | (queues - 1))
        )
        return min(queues, (answer.dw0 & 0xFFFF) + 1, (answer.dw0 >> 16) + 1)

    def _quiesce(self) -> None:
        """Make sure that the controller does no DMA any more, then let go of it."""
        for pair in self._pairs:
            pair.native.stop()
        try:
            self.registers.disable()
        except NvmeError:
            self._try_reset()
        self._doorbells.close()
        self.transport.close()
        # Only now: whatever the controller still wanted to write has no way to memory any more.
        for pair in self._pairs:
            pair.free()
        for guest in self._guests:
            guest.free()
        for memory in self._buffers.values():
            memory.close()
        # Page-locked for a GPU: CUDA has to forget it before its addresses can be anybody else's, also where a transfer
        # that somebody keeps still names it.
        for staging in self._staging.values():
            staging.unlock()
        self._staging.clear()
        for memory in self._staging_memory:
            memory.close()
        self._buffers.clear()
        self._admin_memory.close()

    def _try_reset(self) -> None:
        try:
            self.transport.reset()
        except NvmeError:
            pass  # it is gone, and so is its DMA

    def close(self) -> None:
        """Delete the queues, shut the controller down in order, and let go of it. Does nothing the second time."""
        with self._lock:
            if self._closed or self._process != os.getpid():
                return
            hung: DeadlineExceeded | None = None
            for guest in list(self._guests):
                try:
                    guest.close()
                except DeadlineExceeded as error:
                    hung = error  # it keeps its memory; the controller is closed all the same
            for pair in self._pairs:
                pair.native.stop()
            try:
                if self._dead is None:
                    for pair in self._pairs:
                        pair.delete()
                    self._pairs = []
                    self.registers.shut_down()
            except (NvmeError, DeadlineExceeded):
                pass  # the controller is disabled next, which ends whatever it was doing
            finally:
                # Not before: deleting queues takes commands.
                self._closed = True
                _open_controllers.discard(self)
                self._quiesce()
            if hung is not None:
                raise hung

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{self.info.mn!r}, {len(self._pairs)} I/O queues"
        return f"<gpunvme.nvme.Controller {self.transport.uri!r}, {state}>"

    def check_open(self) -> None:
        """Raise if the controller cannot be used any more.

        Raises
        ------
        ValueError
            If it was closed.
        NvmeError
            If it failed for good; the error that it failed with.
        """
        if self._closed:
            raise ValueError(f"the controller {self.transport.uri!r} is closed")
        if self._process != os.getpid():
            raise ControllerError("the controller belongs to the parent process; open it in the child to use it there")
        if self._dead is not None:
            raise self._dead

    # --- namespaces

    def namespace(self, nsid: int = 1) -> Namespace:
        """One namespace.

        Raises
        ------
        NvmeError
            If it does not exist, is not active, or has a format that cannot be used; says which ones there are.
        """
        from gpunvme.nvme.namespace import Namespace

        with self._lock:
            if nsid not in self._namespaces:
                self._namespaces[nsid] = Namespace(self, nsid)
            return self._namespaces[nsid]

    def namespaces(self) -> list[Namespace]:
        """Every active namespace."""
        return [self.namespace(nsid) for nsid in self.namespace_ids()]

    # --- memory

    def buffer(self, nbytes: int, shape: tuple[int, ...] | None = None) -> Buffer:
        """Host memory that the controller reaches without a copy, until the controller is closed.

        ``shape`` is that of the array of bytes; ``(nbytes,)`` if None.

        Raises
        ------
        MemoryError
            If the transport cannot map as much.
        """
        self.check_open()
        memory = self.transport.allocate(max(nbytes, 1))
        with self._lock:
            self._buffers[memory.address] = memory
        owner = _BufferOwner(memory)
        weakref.finalize(owner, _release_buffer, weakref.ref(self), memory.address).atexit = False
        return Buffer(Span(memory.address, nbytes, CPU, True, owner), (nbytes,) if shape is None else shape)

    def find_buffer(self, address: int, nbytes: int) -> DmaMemory | None:
        """The memory made by `buffer` that holds a range, or None."""
        with self._lock:
            for start, memory in self._buffers.items():
                if start <= address and address + nbytes <= start + memory.nbytes:
                    return memory
        return None

    def staging(self, device: Device) -> _native.IoStaging:
        """Memory that bytes pass through on their way to memory that the controller does not reach.

        Each GPU's transfers have some of their own: they may wait behind a stream of the caller's, and what runs there
        may be waiting for another GPU's.
        """
        with self._lock:
            staging = self._staging.get(device)
            if staging is None:
                slot = max(self.max_bytes, PAGE)
                memory = allocate_aligned(self.transport, max(_STAGING_BYTES // slot, 2) * slot, self.page_bytes)
                self._staging_memory.append(memory)
                staging = self._staging[device] = _native.IoStaging(io_memory(memory), slot)
            return staging

    # --- I/O queues

    @property
    def io_queues(self) -> list[_native.IoQueue]:
        """The I/O queues as they are now."""
        return [pair.native for pair in self._pairs]

    def queues_now(self) -> tuple[list[_native.IoQueue], int]:
        """The I/O queues and their epoch, when no reset is going on.

        Raises
        ------
        NvmeError
            If the controller cannot be used any more.
        """
        with self._lock:
            self.check_open()
            return self.io_queues, self.epoch

    def queues_left(self) -> int:
        """How many I/O queues are left for guests.

        Raises
        ------
        ValueError, NvmeError
            If the controller cannot be used any more.
        """
        with self._lock:
            self.check_open()
            return len(self._free_ids())

    def _free_ids(self) -> list[int]:
        return [each for each in range(self._wanted[0] + 1, self._granted + 1) if each not in self._guest_ids]

    def take_queue_ids(self, count: int) -> list[int]:
        """Queue ids for a guest, as many as there are up to ``count``; `give_queue_ids` gives them back."""
        with self._lock:
            self.check_open()
            taken = self._free_ids()[:count]
            self._guest_ids.update(taken)
            return taken

    def give_queue_ids(self, queue_ids: Sequence[int]) -> None:
        """Give queue ids back whose queues were deleted."""
        with self._lock:
            self._guest_ids.difference_update(queue_ids)

    def admit(self, guest: Guest) -> None:
        """Take queues of someone else's into care, and make them: resets, and the end, are told to their driver."""
        with self._lock:
            self.check_open()
            guest.make_queues()
            self._guests.append(guest)

    def dismiss(self, guest: Guest) -> None:
        """Forget a guest that has deleted its queues."""
        with self._lock:
            if guest in self._guests:
                self._guests.remove(guest)

    def abort_all(self, stuck: Sequence[tuple[int, int]], epoch: int) -> None:
        """Ask for commands to be aborted that were not answered in time; whether it works shows in their queues.

        Parameters
        ----------
        stuck
            (queue id, CID) each, already in quarantine.
        epoch
            Of the queues that they are in. If there are newer ones, nothing is left to do.
        """
        with self._lock:
            self.check_open()
            if epoch != self.epoch:
                return
            with nvtx_ranges.during(f"{len(stuck)} commands aborted on {self.transport.uri}"):
                try:
                    self.registers.check_alive()
                    for queue_id, cid in stuck[: self.info.acl + 1]:
                        self.abort(queue_id, cid, min(self._admin_timeout, self.timeout))
                except (NvmeError, DeadlineExceeded):
                    pass  # a reset comes next

    def recover(self, epoch: int) -> None:
        """Reset the controller, unless its queues are newer than ``epoch`` already.

        Raises
        ------
        NvmeError
            If the controller is beyond recovery; it then stays unusable.
        """
        with self._lock:
            self.check_open()
            if epoch == self.epoch:
                self.reset()

    def reset(self) -> None:
        """Reset the controller and make its queues anew. Transfers in flight repeat what was lost.

        Raises
        ------
        NvmeError
            If it does not come back; it then stays unusable.
        """
        with self._lock:
            self.check_open()
            with nvtx_ranges.during(f"reset of {self.transport.uri}"):
                self._reset_queues()

    def _reset_queues(self) -> None:
        for guest in self._guests:
            guest.leave_queues()
        for pair in self._pairs:
            pair.native.stop()  # from here on nobody touches queue memory or data of commands in flight
        self.resets += 1
        try:
            try:
                self.registers.disable()
            except ControllerError:
                self.transport.reset()
                self.registers.disable()
            pairs, self._pairs = self._pairs, []
            for pair in pairs:
                pair.free()
            for staging in self._staging.values():
                staging.reclaim()
            self._bring_up()
        except (NvmeError, DeadlineExceeded) as error:
            self._dead = ControllerError(f"the controller could not be reset: {error}")
            raise self._dead from error


class _BufferOwner:
    """Keeps the memory of a buffer, even when its controller is closed before it."""

    def __init__(self, memory: DmaMemory) -> None:
        self.memory = memory
        self.owner = memory.owner


def _release_buffer(reference: weakref.ref[Controller], address: int) -> None:
    controller = reference()
    if controller is not None:
        with controller._lock:
            memory = controller._buffers.pop(address, None)
        if memory is not None:
            memory.close()


_open_controllers: weakref.WeakSet[Controller] = weakref.WeakSet()


def _close_all() -> None:
    """Close every controller, whatever closing another one raises; then raise it."""
    failures: list[Exception] = []
    for controller in list(_open_controllers):
        try:
            controller.close()
        except Exception as error:  # noqa: BLE001 - the others must be closed, too
            error.add_note(f"while {controller.transport.uri} was closed")
            failures.append(error)
    if len(failures) == 1:
        raise failures[0]
    if failures:
        raise ExceptionGroup("controllers could not be closed in order", failures)


atexit.register(_close_all)
