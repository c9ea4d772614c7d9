"""One transfer between a namespace and memory, as `gpunvme.Transfer` drives it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from gpunvme import _native, nvtx_ranges
from gpunvme.errors import Cancelled, CommandError, DeadlineExceeded, Error, Failed, NvmeError, TransportError
from gpunvme.memory import Span
from gpunvme.nvme import spec, status
from gpunvme.nvme.dma import DmaMemory, io_memory, page_range
from gpunvme.paths.base import Order
from gpunvme.transfer import Report, error_from_native, format_bytes, raise_native

if TYPE_CHECKING:
    from gpunvme.nvme.namespace import Namespace

# How often a thread that drives looks whether it was told to stop, in seconds.
_STEP = 0.05
# How long an aborted command may take to be answered, in seconds; by a status of its own, like any other.
_ABORT_SECONDS = 0.1
_OPCODES = {int(each): each.name.replace("_", " ").capitalize() for each in spec.NvmOpcode}
_NAMED = 3  # failed commands that an error names; `failures` has all


class NvmeMovement:
    """Commands on their way: submitted and completed by the thread that waits, or by one of its own.

    Parameters
    ----------
    namespace
        Whose blocks are moved.
    opcode, flags
        Of the commands; ``flags`` are bits of CDW12.
    order
        What holds for the whole transfer.
    """

    path_name = "nvme"

    def __init__(self, namespace: Namespace, opcode: int, flags: int, order: Order) -> None:
        self.namespace = namespace
        self._controller = controller = namespace.controller
        self._order = order
        self._memories: list[DmaMemory] = []  # mapped for this transfer alone
        self._kept: list[object] = []
        self._driving = threading.Lock()
        self._ended = threading.Event()
        self._sealed = False
        self._alone = False  # a thread of its own drives it
        self._failure: Exception | None = None
        self._stopped_by: Error | None = None
        self._start = time.perf_counter()
        self._seconds = 0.0
        self._not_mapped = ""
        self._written = opcode == spec.NvmOpcode.READ  # the controller writes to memory
        self._opcode = opcode
        self._range: Any = None  # of NVTX, while its commands are on queues
        queues, self._epoch = controller.queues_now()
        self._queues = len(queues)
        try:
            self._run = _native.IoRun(
                namespace.nsid,
                namespace.block_size,
                controller.max_bytes,
                controller.page_bytes,
                opcode,
                flags,
                controller.timeout,
                queues,
                controller.staging(order.device),
                order.stream,
            )
        except _native.Failure as failure:
            raise_native(failure)

    # --- adding

    def memory(self, span: Span) -> _native.IoMemory:
        """How commands reach memory: directly where the controller can, through the driver's own where not."""
        if span.device.is_gpu:
            return _native.IoMemory.gpu(span.ptr, span.nbytes, span.device.index)
        mapped = self._controller.find_buffer(span.ptr, span.nbytes) or self._map(span)
        if mapped is None:
            return _native.IoMemory.host(span.ptr, span.nbytes)
        return io_memory(mapped, span.ptr, span.nbytes)

    def _map(self, span: Span) -> DmaMemory | None:
        transport = self._controller.transport
        if not transport.maps_any_memory:
            self._not_mapped = "the controller reaches only memory made by Controller.buffer"
            return None
        if span.nbytes < transport.bounce_below:
            self._not_mapped = f"mapping pays from {format_bytes(transport.bounce_below)} on"
            return None
        try:
            mapped = transport.map(*page_range(span.ptr, span.nbytes), self._written)
        except TransportError as error:
            self._not_mapped = str(error)
            return None
        self._memories.append(mapped)
        return mapped

    def keep(self, what: object) -> None:
        """Keep something alive until the end."""
        self._kept.append(what)

    def add_range(self, lba: int, span: Span) -> None:
        """Add blocks from ``lba`` on, as many as the memory holds."""
        if span.nbytes:
            self._add(self._run.add_range, lba, span.nbytes // self.namespace.block_size, self.memory(span), 0)

    def add_blocks(self, lbas: int, count: int, blocks: int, span: Span) -> None:
        """Add ``count`` short runs of blocks, packed; ``lbas`` is the address of an array that the caller keeps."""
        if count:
            self._add(self._run.add_gather, lbas, count, blocks, self.memory(span), 0)

    def add_pieces(self, lba: int, spans: Sequence[Span]) -> None:
        """Add one run of blocks that begins at ``lba`` and goes to, or comes from, many pieces of memory."""
        pieces = [(self.memory(span), 0, span.nbytes) for span in spans if span.nbytes]
        if pieces:
            self._add(self._run.add_pieces, lba, pieces)

    def add_plain(
        self, opcode: int, cdw10: int = 0, cdw11: int = 0, cdw12: int = 0, *, span: Span | None = None
    ) -> None:
        """Add one command as it is."""
        data = None if span is None else (self.memory(span), 0, span.nbytes)
        self._add(self._run.add_simple, opcode, (cdw10, cdw11, cdw12, 0, 0, 0), data)

    @staticmethod
    def _add(function: Callable[..., None], *arguments: Any) -> None:
        try:
            function(*arguments)
        except _native.Failure as failure:  # of CUDA: a stream of another GPU, say
            raise_native(failure)

    def seal(self) -> None:
        """Say that everything was added."""
        self._start = time.perf_counter()
        if nvtx_ranges.ranges is not None:
            self._range = nvtx_ranges.ranges.start(f"{_name(self._opcode)} {self._where()}")
        self._sealed = True
        if self._order.background:
            self._go_on_alone()

    # --- moving

    def _go_on_alone(self) -> None:
        with self._driving:
            if not self._alone:
                self._alone = True
                threading.Thread(target=self._drive_to_end, name="gpunvme-nvme", daemon=True).start()

    def _drive_to_end(self) -> None:
        while not self._ended.is_set():
            self._drive(_STEP)

    def wait(self, seconds: float) -> bool:
        """Wait for the end at most so long, moving commands meanwhile."""
        if self._alone or not self._sealed:  # whoever looks after transfers may ask before anything was added
            return self._ended.wait(seconds)
        give_up = time.monotonic() + seconds
        while not self._ended.is_set():
            left = give_up - time.monotonic()
            self._drive(max(0.0, left))
            if left <= 0:
                break
        return self._ended.is_set()

    def _drive(self, seconds: float) -> None:
        if not self._driving.acquire(timeout=seconds):
            return  # another thread drives it
        try:
            if not self._ended.is_set():
                self._drive_once(seconds)
        finally:
            self._driving.release()

    def _drive_once(self, seconds: float) -> None:
        try:
            state = self._run.drive(seconds)
            if state == "running":
                return
            if state == "done":
                self._end(self._outcome())
                return
            # "timeout": some commands were not answered; "stopped": someone else is resetting the controller.
            if state == "timeout":
                self._recover()
            queues, epoch = self._controller.queues_now()
            if epoch != self._epoch:
                self._run.attach(queues)
                self._epoch = epoch
        except (NvmeError, DeadlineExceeded, ValueError) as error:
            # No commands of ours can be answered any more: the controller is reset, closed or gone.
            self._run.abandon()
            self._end(error)
        except _native.Failure as failure:
            self._run.abandon()
            self._end(error_from_native(failure.args))

    def _recover(self) -> None:
        """Have the commands that were not answered aborted; if that does not bring them back, reset the controller."""
        self._controller.abort_all(self._run.timed_out(), self._epoch)
        state = self._run.drive(_ABORT_SECONDS)
        if state != "stopped" and self._run.timed_out():
            self._controller.recover(self._epoch)

    def _outcome(self) -> Exception | None:
        if self._stopped_by is not None:
            return self._stopped_by
        failures = [Failed(*each) for each in self._run.failures()]
        if not failures:
            return None
        return CommandError(f"{self._controller.transport.uri}: {describe_failures(failures)}", failures)

    def _end(self, failure: Exception | None) -> None:
        self._seconds = time.perf_counter() - self._start
        self._failure = self._stopped_by if failure is not None and self._stopped_by is not None else failure
        for memory in self._memories:
            memory.close()
        self._memories.clear()
        if nvtx_ranges.ranges is not None and self._range is not None:
            nvtx_ranges.ranges.end(self._range)
        self._ended.set()

    def cancel(self) -> None:
        """Submit nothing more."""
        self._stop(Cancelled("the transfer was cancelled"))

    def expire(self) -> None:
        """Submit nothing more, for the deadline has passed."""
        self._stop(DeadlineExceeded("the transfer was not complete by its deadline"))

    def _stop(self, error: Error) -> None:
        if not self._ended.is_set():
            self._stopped_by = self._stopped_by or error
            self._run.abandon()
            self._go_on_alone()  # whoever waited may have had enough

    def failure(self) -> Exception | None:
        """Why it failed, or None."""
        return self._failure

    def report(self) -> Report:
        """What was done so far."""
        counted = self._run.counts()
        seconds = self._seconds if self._ended.is_set() else time.perf_counter() - self._start
        bounced = counted["bounced_host_bytes"] + counted["bounced_gpu_bytes"]
        moved = counted["mapped_bytes"] + bounced
        return Report(self.path_name, self._reason(counted), seconds, direct_bytes=moved, bounced_bytes=bounced)

    def _where(self) -> str:
        queues = f"{self._queues} queue" + ("s" if self._queues != 1 else "")
        return f"over {queues} of {self._controller.transport.uri}"

    def _reason(self, counted: _native.IoRunCounts) -> str:
        if not counted["commands"]:
            return "nothing was moved"
        said = [f"{counted['commands']} commands {self._where()}"]
        if counted["bounced_host_bytes"]:
            why = f" ({self._not_mapped})" if self._not_mapped else " (not aligned to 4 bytes)"
            said.append(f"{format_bytes(counted['bounced_host_bytes'])} through memory of the driver's own{why}")
        if counted["bounced_gpu_bytes"]:
            kind = "page-locked memory" if counted["page_locked"] else "pageable memory, page-locking was refused"
            said.append(f"{format_bytes(counted['bounced_gpu_bytes'])} through {kind}")
        if counted["retried"]:
            said.append(f"{counted['retried']} tried again")
        return ", ".join(said)


def describe_failures(failures: Sequence[Failed]) -> str:
    """What failed, in one line."""
    said = "; ".join(_describe(failed) for failed in failures[:_NAMED])
    more = f"; and {len(failures) - _NAMED} more" if len(failures) > _NAMED else ""
    return f"{len(failures)} command{'s' if len(failures) != 1 else ''} failed: {said}{more}"


def _name(opcode: int) -> str:
    return _OPCODES.get(opcode, f"command {opcode:02X}h")


def _describe(failed: Failed) -> str:
    where = f"{_name(failed.opcode)} of {failed.blocks} blocks at LBA {failed.lba}"
    fates = {"timeout": "was never answered", "lost": "was lost in a reset"}
    what = fates.get(failed.kind) or status.describe(failed.status)
    return f"{where} (queue {failed.queue_id}, CID {failed.cid}): {what}"
