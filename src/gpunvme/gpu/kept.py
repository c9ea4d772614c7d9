"""GPU queues that the ``gpu-nvme`` path keeps: made once for each namespace and GPU, closed with its last source."""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from contextlib import ExitStack
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gpunvme import _native
from gpunvme.gpu.compile import own_kernels
from gpunvme.gpu.driver import Gpu
from gpunvme.gpu.queues import MOST_QUEUES
from gpunvme.memory import Device, Span, address_of

if TYPE_CHECKING:
    from gpunvme.nvme.namespace import Namespace
    from gpunvme.paths.nvme import NamespaceSource

_CUT_THREADS, _MOST_CUT_BLOCKS = 128, 512
# Transfers at a time that find all they need in place: a loader of layers reads two.
_LANES = 2
# What passes a lane at once where only a part of blocks is wanted; and how many cuts that can be.
_BOUNCE_BYTES = 4 << 20
MOST_CUTS = 8192
CUT = np.dtype([("from", "u8"), ("to", "u8"), ("nbytes", "u8")])  # Cut in kernels/cuts.cu


class Lane:
    """What one transfer uses alone: a stream, an event, and memory for blocks of which a part is wanted.

    Parameters
    ----------
    gpu
        The GPU.
    """

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self._keep = ExitStack()
        try:
            self.stream = gpu.stream()
            self._keep.callback(gpu.destroy, stream=self.stream)
            self.event = gpu.event()
            self._keep.callback(gpu.destroy, event=self.event)
            bounce = gpu.allocate(_BOUNCE_BYTES)
            self._keep.callback(gpu.free, bounce)
            host, self.table = gpu.allocate_host(MOST_CUTS * CUT.itemsize)
            self._keep.callback(gpu.free_host, host)
        except BaseException:
            self.close()
            raise
        self.bounce = Span(bounce, _BOUNCE_BYTES, Device("cuda", gpu.index))
        self._host = Span(host, MOST_CUTS * CUT.itemsize)

    def write_table(self, cuts: NDArray[np.void]) -> None:
        """Say what is cut; the last ones were cut already."""
        ctypes.memmove(self._host.ptr, address_of(cuts), cuts.nbytes)

    def close(self) -> None:
        """Give everything back. Only when nothing of it is used any more."""
        self._keep.close()


class KeptQueues:
    """GPU queues of a namespace, and what transfers need besides.

    Everything is allocated and loaded here, for a kernel of the caller's that waits for the host, or for data, may keep
    the driver from doing it later.

    Parameters
    ----------
    namespace
        Whose blocks they move.
    device
        The GPU.

    Raises
    ------
    CudaError, PathError, NvmeError
        As for `Namespace.gpu_queues`.
    """

    def __init__(self, namespace: Namespace, device: Device) -> None:
        self.users: weakref.WeakSet[NamespaceSource] = weakref.WeakSet()
        self._speeds: dict[bool, float] = {}
        self._lock = threading.Lock()
        self._process = os.getpid()
        self._closed = False
        self._lanes: list[Lane] = []
        self.queues = namespace.gpu_queues(device, count=_share(namespace))
        try:
            self.gpu = Gpu(device.index)
            self._cut = own_kernels(self.gpu).kernel("gpunvme_cut")
            for _ in range(_LANES):
                self._lanes.append(Lane(self.gpu))
        except BaseException:
            self.close()
            raise

    @property
    def how(self) -> str:
        """How commands are moved, for reports."""
        queues = self.queues
        count = f"{queues.count} queue" + ("s" if queues.count != 1 else "")
        return (
            f"kernels on {queues.device} over {count} of {queues.namespace.controller.transport.uri}, placement "
            f"{queues.placement!r}, doorbells {queues.doorbell_reason}"
        )

    def take_lane(self) -> Lane:
        """A lane that nobody else uses."""
        with self._lock:
            if self._lanes:
                return self._lanes.pop()
        lane: Lane = self.queues._moves.while_quiet(lambda: Lane(self.gpu))
        return lane

    def give_lane(self, lane: Lane) -> None:
        """Give one back, when nothing of it is in flight."""
        with self._lock:
            if not self._closed:
                self._lanes.append(lane)
                return
        lane.close()

    def cut(self, lane: Lane, cuts: NDArray[np.void]) -> None:
        """Copy parts of blocks from a lane's memory to where they are wanted; its event happens when that is done."""
        lane.write_table(cuts)
        blocks = min(_MOST_CUT_BLOCKS, -(-len(cuts) * 32 // _CUT_THREADS))

        def launch() -> None:
            self._cut.launch(blocks, _CUT_THREADS, lane.table, len(cuts), stream=lane.stream)
            self.gpu.record(lane.event, lane.stream)

        self.queues._moves.begin_brief(launch, lane.event)

    def has_cut(self, lane: Lane) -> bool:
        """Whether the last `cut` is done."""
        done = self.gpu.happened(lane.event)
        if done:
            self.queues._moves.end_brief(lane.event)
        return done

    def speed(self, *, gather: bool) -> float | None:
        """Bytes per second of the last large transfer, or gather."""
        return self._speeds.get(gather)

    def note_speed(self, speed: float, *, gather: bool) -> None:
        """Remember how fast a transfer was."""
        self._speeds[gather] = speed

    def close(self) -> None:
        """Close the queues, then free what their kernels used.

        Raises
        ------
        DeadlineExceeded
            If a kernel does not end; see `GpuQueues.close`. Lanes stay reserved then, too.
        """
        if self._process != os.getpid():
            return
        self.queues.close()
        with self._lock:
            self._closed = True
            lanes, self._lanes = self._lanes, []
        for lane in lanes:
            lane.close()


def _share(namespace: Namespace) -> int:
    """How many queues a GPU gets: the usual number, but one is left for each GPU that has none here yet."""
    controller = namespace.controller
    without = len(_native.cuda_devices()) - 1 - sum(other.controller is controller for other, _ in _kept)
    return max(1, min(MOST_QUEUES, controller.queues_left() - max(0, without)))


_kept: dict[tuple[Namespace, int], KeptQueues] = {}
_making = threading.Lock()


def queues_of(source: NamespaceSource, device: Device) -> KeptQueues:
    """The queues of a source's namespace, made now if they are not there; they stay at least as long as the source.

    Raises
    ------
    CudaError, PathError, NvmeError
        If they cannot be made.
    """
    key = source.namespace, device.index
    with _making:
        found = _kept.get(key)
        if found is None:
            found = _kept[key] = KeptQueues(source.namespace, device)
        if source not in found.users:
            found.users.add(source)
            source.on_close.callback(_release, key, source)
        return found


def look(namespace: Namespace, device: Device) -> KeptQueues | None:
    """The queues that are there already, or None."""
    return _kept.get((namespace, device.index))


def _release(key: tuple[Namespace, int], source: NamespaceSource) -> None:
    with _making:
        found = _kept.get(key)
        if found is None:
            return
        found.users.discard(source)
        if found.users:
            return
        del _kept[key]
    found.close()


def _after_fork_in_child() -> None:
    global _making
    _making = threading.Lock()
    _kept.clear()  # the parent's


os.register_at_fork(after_in_child=_after_fork_in_child)
