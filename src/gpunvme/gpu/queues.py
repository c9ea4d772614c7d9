"""`GpuQueues`: NVMe queues that GPU kernels drive by themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

from gpunvme.errors import NvmeError, SpanError
from gpunvme.gpu.cache import CachedArray
from gpunvme.gpu.compile import own_kernels
from gpunvme.gpu.driver import Gpu
from gpunvme.gpu.placement import check_placement
from gpunvme.gpu.probe import Probe
from gpunvme.gpu.queue_set import QUIET_SECONDS, QueueShape
from gpunvme.memory import Device
from gpunvme.transfer import Transfer

if TYPE_CHECKING:
    from gpunvme.nvme.namespace import Namespace

_KERNELS = ("layout", "set_up", "reap", "gather", "scatter", "stream")
MOST_QUEUES = 8  # that are made unless the caller says how many
_DEPTH = 256  # entries of a queue, the same
_MOST_SLOTS = 1023  # of a queue: leaves CIDs some generations
_LEAST_SLOT_BYTES = 4096


class GpuQueues:
    """I/O queues of a controller that kernels of one GPU drive. Made by `Namespace.gpu_queues`; a context manager.

    Several threads may use it, and several kernels at once.

    Attributes
    ----------
    handle
        Device address of an array of `count` ``gpunvme::GpuQueue``, for kernels of your own (``gpunvme/device.h``,
        `gpunvme.gpu.compile`).
    count, depth, slot_bytes
        Queues, entries of each, and the largest command of a slot in bytes.
    placement, reasons
        Where queues and data are; for each placement why it is used or not.
    doorbell, doorbell_reason
        ``"direct"`` or ``"forward"``, and what that means here.
    """

    def __init__(
        self,
        namespace: Namespace,
        device: Any = 0,
        *,
        count: int | None = None,
        depth: int | None = None,
        placement: str = "auto",
        doorbell: str = "auto",
        slot_bytes: int | None = None,
        timeout: float | None = None,
    ) -> None:
        self.namespace = namespace
        self._controller = controller = namespace.controller
        self.device = Device.parse(device)
        if not self.device.is_gpu:
            raise SpanError(f"GPU queues are driven by a GPU, not by {self.device}")
        if depth is None:
            depth = min(_DEPTH, controller.registers.cap.queue_entries)
        self._check_shape(count, depth, slot_bytes, timeout)
        check_placement(placement)
        self.timeout = controller.timeout if timeout is None else timeout
        self.gpu = Gpu(self.device.index)
        self.name = namespace.name
        self.depth = depth
        self.slot_bytes = self._slot_size(slot_bytes)
        piece_blocks = min(self.slot_bytes, controller.max_bytes) // namespace.block_size
        shape = QueueShape(depth, min(depth - 1, _MOST_SLOTS), self.slot_bytes, piece_blocks, self.timeout)
        # Allocate, map and load everything now: while a kernel runs, none of this may happen.
        program = own_kernels(self.gpu)
        kernels = {name: program.kernel("gpunvme_" + name).handle for name in _KERNELS}
        probe = Probe(self.gpu, namespace, kernels, shape, doorbell)
        self._set, self._moves = probe.make(placement, lambda: self._take_ids(count))
        self.placement, self.reasons = self._set.placement, probe.reasons
        self.count = self._set.count
        self.handle = self._set.handle
        self.doorbell, self.doorbell_reason = self._set.doorbells.kind, self._set.doorbells.reason

    # --- making

    def _check_shape(self, count: int | None, depth: int, slot_bytes: int | None, timeout: float | None) -> None:
        most = self._controller.registers.cap.queue_entries
        if not 2 <= depth <= most:
            raise ValueError(f"depth is {depth}: a queue of this controller has 2 to {most} entries (CAP.MQES)")
        if count is not None and count < 1:
            raise ValueError(f"count is {count}: at least one queue")
        if slot_bytes is not None and slot_bytes < 1:
            raise ValueError(f"slot_bytes is {slot_bytes}: at least one block")
        if timeout is not None and timeout <= 0:
            raise ValueError("timeout must be more than 0 seconds")

    def _slot_size(self, wanted: int | None) -> int:
        """Bytes of a slot's buffer: whole pages, whole blocks, no more than a command may have."""
        controller = self._controller
        least = max(_LEAST_SLOT_BYTES, self.namespace.block_size, controller.page_bytes)
        size = max(least, min(wanted or least, controller.max_bytes))
        return -(-size // controller.page_bytes) * controller.page_bytes

    def _take_ids(self, count: int | None) -> list[int]:
        least = 1 if count is None else count
        taken = self._controller.take_queue_ids(MOST_QUEUES if count is None else count)
        if len(taken) < least:
            self._controller.give_queue_ids(taken)
            raise NvmeError(
                f"{self._controller.transport.uri}: GPU queues need {least} of the controller's I/O queues, and "
                f"{len(taken)} are left; open it with fewer of its own, queues={len(self._controller.io_queues)} now"
            )
        return taken

    # --- moving

    def gather(
        self,
        lbas: Any,
        out: Any,
        *,
        blocks: int | None = None,
        stream: Any = None,
        wait: bool = True,
        timeout: float | None = None,
    ) -> Transfer:
        """Read many short runs of blocks, packed in the order of ``lbas``.

        Parameters
        ----------
        lbas
            First block of each: on the host as for `Namespace.gather`, or a one-dimensional array of 64-bit integers on
            the GPU, which the kernel reads in the stream's order. LBAs on the GPU that are outside of the namespace
            fail with the status LBA Out of Range, each for itself.
        out
            Where to: contiguous memory of the GPU.
        blocks
            Blocks of each; as many as ``out`` has room for if None, which must then be a whole number.
        stream
            Stream that the kernel is ordered in; see `File.read_into`. What the caller puts into it afterwards finds
            the data, unless the transfer fails.
        wait
            Whether to wait for the end. Only then are commands repeated whose completions were lost; otherwise
            `Transfer.wait` raises. The queues are recovered in both cases.
        timeout
            Seconds for all of it; None is for ever. Each command has the queues' `timeout` besides.

        Raises
        ------
        RangeError
            If blocks are not in the namespace; says which.
        SpanError
            If ``out`` is on another device, too small, read-only or not contiguous.
        CommandError
            If commands failed; its ``failures`` lists them, at most 4096.
        NvmeError, CudaError, DeadlineExceeded, Cancelled
            If it fails on the way.
        """
        return self._moves.rows("gather", lbas, out, blocks, stream, wait, timeout)

    def scatter(
        self,
        lbas: Any,
        source: Any,
        *,
        blocks: int | None = None,
        stream: Any = None,
        wait: bool = True,
        timeout: float | None = None,
    ) -> Transfer:
        """Write rows of GPU memory to many short runs of blocks: the inverse of `gather`.

        Where two rows name the same block, it has the content of either.

        Raises
        ------
        UnsafeDeviceError
            As `Namespace.write_from`; and the same errors as `gather`.
        """
        self.namespace.check_writable()
        return self._moves.rows("scatter", lbas, source, blocks, stream, wait, timeout)

    def stream(
        self, lba: int, nbytes: int, out: Any, *, stream: Any = None, wait: bool = True, timeout: float | None = None
    ) -> Transfer:
        """Read one long run of blocks.

        Parameters
        ----------
        lba
            First block.
        nbytes
            Bytes; a whole number of blocks.
        out
            Where to: contiguous memory of the GPU, of ``nbytes`` bytes at least.
        stream, wait, timeout
            As for `gather`.

        Raises the same errors as `gather`.
        """
        return self._moves.stream(lba, nbytes, out, stream, wait, timeout)

    def cached_array(
        self,
        dtype: Any,
        *,
        lba: int = 0,
        length: int | None = None,
        capacity_bytes: int = 256 << 20,
        line_bytes: int = 4096,
    ) -> CachedArray:
        """Make an array of the blocks that kernels index, with a cache in GPU memory in front of it.

        Parameters
        ----------
        dtype
            NumPy type of the elements: of 1, 2, 4, 8 or 16 bytes.
        lba
            Block that the array begins with.
        length
            Elements; all that follow if None.
        capacity_bytes
            GPU memory for lines, at least eight of them.
        line_bytes
            What is read at a time, a power of two from 4096 to 65536. Make the queues with ``slot_bytes`` as large:
            otherwise a line is read by several commands, one after the other.

        Raises
        ------
        TypeError, ValueError, RangeError
            If elements, lines, capacity or range are not possible; says why.
        CudaError
            If there is not so much memory.
        """
        return CachedArray(self, dtype, lba=lba, length=length, capacity_bytes=capacity_bytes, line_bytes=line_bytes)

    # --- looking after the queues

    @property
    def recoveries(self) -> int:
        """How often commands were lost, or the controller had failed, and that was put right."""
        return self._set.recoveries

    def recover(self) -> None:
        """Look whether commands were lost or the controller has failed, and put that right. A thread does it too.

        For who launches kernels of their own and does not want to wait for that thread.

        Raises
        ------
        NvmeError, CudaError
            If the controller, or CUDA, is beyond recovery.
        """
        self._set.recover()

    def stats(self) -> list[dict[str, int]]:
        """Counters of each queue since it was made.

        ``completed`` commands; completions with ``unknown`` CIDs, ``late`` ones (of commands that were finished or
        given up before), ones with a ``bad_head``; commands that are ``stuck`` now: given up, and not answered yet.
        """
        return self._set.stats()

    # --- ending

    def close(self, timeout: float = QUIET_SECONDS) -> None:
        """Stop the queues, delete them, and free their memory. Does nothing the second time.

        Parameters
        ----------
        timeout
            Seconds that kernels may take to end.

        Raises
        ------
        DeadlineExceeded
            If a kernel does not end. The queues are then deleted on the controller, which does nothing more for them;
            their memory stays reserved until the process ends.
        """
        self._set.close(timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = f"{self.count} queues of {self.depth} entries, placement {self.placement}"
        state = "closed" if self._set.closed else state
        return f"<gpunvme.gpu.GpuQueues of {self.name!r} on {self.device}, {state}>"
