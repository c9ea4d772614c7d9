"""The queues behind `GpuQueues`: made, watched, recovered, made anew, and taken down in the only safe order."""

from __future__ import annotations

import ctypes
import os
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from gpunvme import nvtx_ranges
from gpunvme.errors import CudaError, DeadlineExceeded, NvmeError
from gpunvme.gpu.doorbells import GpuDoorbells
from gpunvme.gpu.driver import Gpu
from gpunvme.gpu.memory import GpuMemory, Layout, QueueMemory
from gpunvme.gpu.running import Running
from gpunvme.gpu.shared_memory import SharedAllocator

if TYPE_CHECKING:
    from gpunvme.nvme.namespace import Namespace
    from gpunvme.nvme.queues import QueuePair

QUIET_SECONDS = 5.0  # that kernels may take to end once their queues are stopped
_ABORT_SECONDS = 0.1  # that an aborted command may take to be answered
_AGAIN_SECONDS = 30.0  # that a reset may take
_BUSY_LOOK, _IDLE_LOOK = 0.02, 0.1  # how often the watcher looks, in seconds
_SETUP_WORDS = 18  # QueueSetup in kernels/queues.cu
_COUNTERS = ("completed", "unknown", "late", "bad_head")

# Queues whose kernel never ended: their memory may still be touched, so it is never given back.
_abandoned: list[object] = []


@dataclass(frozen=True, slots=True)
class QueueShape:
    """What queues are like.

    Attributes
    ----------
    depth, slots
        Entries of each, and commands in flight on each.
    slot_bytes, piece_blocks
        Size of a slot's buffer, and blocks of the largest command.
    timeout
        Of a command, in seconds.
    """

    depth: int
    slots: int
    slot_bytes: int
    piece_blocks: int
    timeout: float


class Job(Protocol):
    """A kernel's launch that uses the queues."""

    def wait(self, seconds: float) -> bool:
        """Wait at most so long for its end."""


class QueueSet:
    """Queue pairs that kernels of one GPU drive, in one placement; a guest of the controller.

    Parameters
    ----------
    gpu, namespace
        Who drives them, and for which blocks.
    kernels
        Handles of the kernels in kernels/queues.cu.
    queue_ids
        Their numbers, taken from the controller; given back with the queues.
    shape
        What they are like.
    placement
        Where their memory is: ``"host"``, ``"data"`` or ``"full"``.
    doorbell
        As for `GpuDoorbells`.

    Attributes
    ----------
    jobs
        What is in flight; the watcher looks more often then.
    running
        Whether any kernel that uses them runs, of those that are launched here.
    """

    def __init__(
        self,
        gpu: Gpu,
        namespace: Namespace,
        kernels: dict[str, int],
        queue_ids: list[int],
        shape: QueueShape,
        *,
        placement: str,
        doorbell: str,
    ) -> None:
        self._gpu = gpu
        self._namespace = namespace
        self._controller = namespace.controller
        self._kernels = kernels
        self._queue_ids = queue_ids
        self.shape = shape
        self.placement = placement
        self.jobs: set[Job] = set()
        self.process = os.getpid()
        self.gate = threading.Condition()  # launches wait here while queues are made anew
        self.looking = threading.Lock()  # one at a time uses our stream
        self._recovering = threading.RLock()
        self._ended = threading.Event()
        self._closing = threading.Lock()
        self.closed = False
        self._up = False
        self._dead: Exception | None = None
        self._made: list[QueuePair] = []  # exist on the controller
        self.recoveries = 0
        self._watcher = threading.Thread(target=self._watch, name="gpunvme-gpu-queues", daemon=True)
        self.keep = ExitStack()  # whatever is to be freed with the queues, latest first
        try:
            self.stream = gpu.stream()
            self.keep.callback(gpu.destroy, stream=self.stream)
            self.running = Running(gpu)
            self.keep.callback(self.running.close)
            self.shared = SharedAllocator(gpu, self._controller, placement, self.stream)
            depth, slots = shape.depth, shape.slots
            self._layout = Layout.ask(gpu, kernels["layout"], depth, slots, self.stream)
            self.doorbells = GpuDoorbells(gpu, self._controller, queue_ids, doorbell)
            self.keep.callback(self.doorbells.close)
            self._memory = QueueMemory(
                gpu, self._controller, queue_ids, depth, slots, shape.slot_bytes, self._layout, self.shared
            )
            self.keep.callback(self._memory.free)
            self._memory.upload(self.stream)
            self._setups = GpuMemory(gpu, _SETUP_WORDS * 8 * len(queue_ids))
            self.keep.callback(self._setups.close)
        except BaseException:
            self.keep.close()
            raise
        self.handle = self._memory.handles.address
        self.count = len(queue_ids)

    def watch(self) -> None:
        """Begin to look after the queues, which the controller has made."""
        self._watcher.start()

    # --- using

    def check_usable(self) -> None:
        """Raise if the queues cannot be used any more."""
        self._check_not_ended()
        if self.process != os.getpid():
            raise CudaError("GPU queues belong to the parent process; make them in the child to use them there")
        if self._dead is not None:
            raise self._dead

    def _check_not_ended(self) -> None:
        if self._ended.is_set():
            raise ValueError(f"the GPU queues of {self._namespace.name} are closed")

    def wait_until_up(self) -> None:
        """Wait while the queues are made anew. The caller holds the gate, and launches before it lets go."""
        self.check_usable()
        if not self.gate.wait_for(lambda: self._up or self._ended.is_set() or self._dead is not None, _AGAIN_SECONDS):
            raise DeadlineExceeded(
                f"{self._namespace.name}: its GPU queues were not made anew in {_AGAIN_SECONDS:.0f} s"
            )
        self.check_usable()

    # --- looking

    def _states(self) -> NDArray[np.uint8]:
        """The queues' states as they are now, one row each."""
        states = self._memory.states
        with self.looking:
            self._check_not_ended()  # or it may be freed already: who closes does not wait for ever for who recovers
            self._gpu.to_host(states.host, states.address, states.nbytes, self.stream)
            self._gpu.synchronize(self.stream)
            return cast(NDArray[np.uint8], states.shadow.reshape(len(self._queue_ids), -1).copy())

    def _stuck_on(self, state: NDArray[np.uint8]) -> int:
        return int(state[self._layout.stuck : self._layout.stuck + 4].view(np.uint32)[0])

    def _stuck(self) -> list[tuple[int, int]]:
        """(queue id, CID) of every command in quarantine."""
        layout, found = self._layout, []
        for queue_id, state in zip(self._queue_ids, self._states(), strict=True):
            if self._stuck_on(state):
                slots = state[layout.slots : layout.slots + self.shape.slots * layout.slot_bytes]
                words = slots.reshape(self.shape.slots, layout.slot_bytes)[:, :8].copy().view(np.uint64).reshape(-1)
                given_up = words[(words & np.uint64(layout.state_mask)) == layout.quarantined]
                found += [(queue_id, int(word) >> layout.cid_shift & 0xFFFF) for word in given_up]
        return found

    def stats(self) -> list[dict[str, int]]:
        """Counters of each queue since it was made, and how many commands are given up now."""
        self.check_usable()
        every = []
        for state in self._states():
            at = self._layout.counters
            counters = map(int, state[at : at + 8 * len(_COUNTERS)].view(np.uint64))
            every.append({**dict(zip(_COUNTERS, counters, strict=True)), "stuck": self._stuck_on(state)})
        return every

    def _watch(self) -> None:
        while not self._ended.wait(_BUSY_LOOK if self.jobs else _IDLE_LOOK):
            try:
                self.recover()
            except (NvmeError, DeadlineExceeded, CudaError, ValueError) as error:
                with self.gate:
                    self._dead = self._dead or error
                    self.gate.notify_all()
                return

    def recover(self) -> None:
        """Look whether commands were lost or the controller has failed, and put that right. The watcher does it too.

        Lost commands are aborted. If that does not bring them back, the controller is reset, and its queues, these too,
        are made anew.

        Raises
        ------
        NvmeError
            If the controller is beyond recovery.
        CudaError
            If CUDA is.
        """
        with self._recovering:
            if self._ended.is_set():
                return
            controller = self._controller
            controller.check_open()
            epoch = controller.epoch
            try:
                controller.registers.check_alive()
            except NvmeError:
                self.recoveries += 1
                controller.recover(epoch)
                return
            stuck = self._stuck()
            if not stuck:
                return
            self.recoveries += 1
            with nvtx_ranges.during(f"{len(stuck)} commands lost on GPU queues of {self._namespace.name}"):
                self._bring_back(stuck, epoch)

    def _bring_back(self, stuck: list[tuple[int, int]], epoch: int) -> None:
        """Have commands aborted and take their completions; reset the controller if they do not come."""
        self._controller.abort_all(stuck, epoch)
        end = time.monotonic() + _ABORT_SECONDS
        while self._stuck():
            if time.monotonic() > end:
                self._controller.recover(epoch)
                return
            # Completions that come when no kernel waits any more are taken by this one.
            grid = len(self._queue_ids), 1, 1
            with self.looking, self.running.launching():
                self._check_not_ended()
                handle = [ctypes.c_uint64(self.handle)]
                self._gpu.launch(self._kernels["reap"], grid, (32, 1, 1), handle, self.stream)
                self._gpu.synchronize(self.stream)
            time.sleep(0.005)

    # --- made and left, as a controller's guest

    def make_queues(self) -> None:
        """Make the queues, at first or after a reset."""
        self._made = []  # whatever there was is gone
        if self._dead is not None:
            return
        try:
            self._memory.zero()
        except CudaError as error:
            with self.gate:
                self._dead = error
                self.gate.notify_all()
            return
        self.doorbells.forget()
        try:
            for pair in self._memory.pairs:
                pair.create()
                self._made.append(pair)
        except BaseException:
            while self._made:
                self._made.pop().remove()
            raise
        dead: CudaError | None = None
        try:
            self._set_up()
        except CudaError as error:
            dead = error
        with self.gate:
            self._dead = dead
            self._up = dead is None
            self.gate.notify_all()

    def _set_up(self) -> None:
        """Let the GPU write the queues' state as it is in the beginning."""
        memory, namespace, page = self._memory, self._namespace, self._controller.page_bytes
        shape = self.shape
        words: list[int] = []
        for number, queue_id in enumerate(self._queue_ids):
            submissions, completions = memory.entries[number]
            words += [submissions.gpu_address, completions.gpu_address, *self.doorbells.addresses(queue_id)]
            words += [memory.state_at(number), memory.data[number].gpu_address]
            words += [memory.pages_at(number), memory.lists_at(number)]
            words += [namespace.blocks, int(shape.timeout * 1e9), shape.depth, shape.slots]
            words += [page, shape.slot_bytes // page, namespace.block_size, shape.piece_blocks]
            words += [namespace.nsid, queue_id]
        count = len(self._queue_ids)
        with self.looking, self.running.launching():
            self._setups.shadow[:] = np.array(words, np.uint64).view(np.uint8)
            self._gpu.to_gpu(self._setups.address, self._setups.host, self._setups.nbytes, self.stream)
            arguments = [ctypes.c_uint64(self._setups.address), ctypes.c_uint64(self.handle), ctypes.c_uint32(count)]
            self._gpu.launch(self._kernels["set_up"], (-(-count // 32), 1, 1), (32, 1, 1), arguments, self.stream)
            self._gpu.synchronize(self.stream)

    def leave_queues(self) -> None:
        """Before a reset: stop the queues, and return when no kernel touches them any more."""
        with self.gate:
            self._up = False
        try:
            self._stop()
            if not self._is_quiet(QUIET_SECONDS + self.shape.timeout):
                raise DeadlineExceeded(
                    f"a kernel on cuda:{self._gpu.index} did not end when its queues were stopped; they cannot be used "
                    "again"
                )
        except (CudaError, DeadlineExceeded) as error:
            with self.gate:
                self._dead = self._dead or error

    def _stop(self) -> None:
        with self.looking:
            ctypes.c_uint32.from_address(self._setups.host).value = 1
            for number in range(len(self._queue_ids)):
                where = self._memory.state_at(number) + self._layout.stopped
                self._gpu.to_gpu(where, self._setups.host, 4, self.stream)
            self._gpu.synchronize(self.stream)

    def _is_quiet(self, seconds: float) -> bool:
        """Wait until nothing runs on the GPU any more."""
        trouble: list[CudaError] = []

        def synchronize() -> None:
            try:
                self._gpu.synchronize()
            except CudaError as error:
                trouble.append(error)

        # The driver's wait has no deadline; the thread may stay in it for ever.
        thread = threading.Thread(target=synchronize, name="gpunvme-gpu-quiet", daemon=True)
        thread.start()
        thread.join(seconds)
        if trouble:
            raise trouble[0]
        return not thread.is_alive()

    # --- ending

    def _end(self, timeout: float) -> bool:
        """Let every kernel end; whether they did."""
        with self.gate:
            self._ended.set()
            self._up = False
            self.gate.notify_all()
        if self._watcher.is_alive():
            self._watcher.join(timeout=1)  # it may wait for a lock of the one who closes
        quiet = True
        try:
            self._stop()
            quiet = self._is_quiet(timeout)
        except CudaError:
            pass  # a kernel failed, and with it the whole context: nothing of it runs any more
        if quiet:
            self.doorbells.close()  # now: their mapping goes with the transport
        else:
            self.doorbells.stop()
        return quiet

    def _delete(self) -> bool:
        """Delete the queues on the controller; whether it did. If not, it has to be disabled before memory is freed."""
        try:
            for pair in self._made:
                pair.remove()
        except (NvmeError, DeadlineExceeded):
            return False
        self._controller.give_queue_ids(self._queue_ids)
        return True

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
        with self._closing:
            if self.closed or self.process != os.getpid():
                return
            self.closed = True
        quiet = self._end(timeout)
        for job in list(self.jobs):
            job.wait(0)  # its kernel has ended: it takes what there is
        deleted = self._delete()
        if not quiet:
            # Kept until the process ends: a kernel may still touch it.
            _abandoned.append((self.keep.pop_all(), self._controller.transport))
        if deleted:
            self._controller.dismiss(self)
            self.free()
        if not quiet:
            raise DeadlineExceeded(
                f"a kernel on cuda:{self._gpu.index} still runs {timeout:.0f} s after its queues were stopped; their "
                "memory stays reserved until the process ends"
            )

    def free(self) -> None:
        """Free all memory: neither the controller nor a kernel uses it any more."""
        self.keep.close()
