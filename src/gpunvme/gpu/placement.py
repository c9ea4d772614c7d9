"""Where a GPU queue's memory lives, and how its kernel reaches memory and doorbells of this process.

Tier 1, ``"host"``: queues and data in host memory. Tier 2, ``"data"``: data in GPU memory. Tier 3, ``"full"``: queues
and data in GPU memory. Tiers 2 and 3 need a transport that gives a controller addresses of GPU memory.
"""

from __future__ import annotations

import ctypes
import threading
import time
from typing import TYPE_CHECKING

from gpunvme.errors import CudaError, NvmeError, PathError
from gpunvme.gpu.driver import Gpu
from gpunvme.nvme.dma import PAGE, DmaMemory, page_range

if TYPE_CHECKING:
    from gpunvme.nvme.controller import Controller
    from gpunvme.nvme.transport import Transport

PLACEMENTS = ("host", "data", "full")
DOORBELLS = ("auto", "direct", "forward")

# Why no controller of a transport reaches GPU memory. A transport that can do it says so by having `map_gpu`.
_NO_GPU_MEMORY = {
    "soft": "the software controller copies with the CPU, which does not reach GPU memory",
    "vfio-user": "the server reaches only memory that is shared with it by descriptor, which GPU memory is not",
    "pci": "VFIO gives a controller no address of GPU memory; that takes a kernel module",
}


def choose(transport: Transport, wanted: str) -> tuple[str, dict[str, str]]:
    """Pick the highest placement that the transport allows; and why the others are not used.

    Raises
    ------
    ValueError
        If ``wanted`` is no placement.
    PathError
        If it was asked for by name and cannot be used.
    """
    if wanted != "auto" and wanted not in PLACEMENTS:
        raise ValueError(f"placement is 'auto', {', '.join(map(repr, PLACEMENTS))}, not {wanted!r}")
    scheme = transport.uri.partition(":")[0]
    why = _NO_GPU_MEMORY.get(scheme, f"{scheme}: gives a controller no address of GPU memory")
    reasons = dict.fromkeys(("data", "full"), why)
    if wanted in reasons:
        raise PathError(f"placement {wanted!r} cannot be used on {transport.uri}: {why}")
    return "host", reasons


class _Registered:
    """Memory that is page-locked for a GPU, counted: doorbells of several queues share a page."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users: dict[tuple[int, int], tuple[int, int]] = {}  # (gpu, address): users, address for the GPU

    def add(self, gpu: Gpu, address: int, nbytes: int, *, may_be_io: bool) -> int:
        key = gpu.index, address
        with self._lock:
            users, seen = self._users.get(key, (0, 0))
            if not users:
                try:
                    seen = gpu.register(address, nbytes)
                except CudaError:
                    if not may_be_io:
                        raise
                    seen = gpu.register(address, nbytes, io=True)
            self._users[key] = users + 1, seen
            return seen

    def remove(self, gpu: Gpu, address: int) -> None:
        key = gpu.index, address
        with self._lock:
            users, seen = self._users.pop(key)
            if users > 1:
                self._users[key] = users - 1, seen
            else:
                gpu.unregister(address)


_registered = _Registered()


class MappedMemory:
    """Host memory that both a controller and a GPU reach.

    Parameters
    ----------
    gpu
        The GPU.
    memory
        The controller's view of it.
    """

    def __init__(self, gpu: Gpu, memory: DmaMemory) -> None:
        self._gpu = gpu
        self.memory = memory
        self._start, nbytes = page_range(memory.address, memory.nbytes)
        try:
            base = _registered.add(gpu, self._start, nbytes, may_be_io=False)
        except BaseException:
            memory.close()
            raise
        self.gpu_address = base + memory.address - self._start

    def zero(self) -> None:
        """Zero it."""
        ctypes.memset(self.memory.address, 0, self.memory.nbytes)

    def close(self) -> None:
        """Take it away from the GPU, then from the controller. Only when neither uses it."""
        try:
            _registered.remove(self._gpu, self._start)
        except CudaError:
            pass  # a kernel failed, and with it the whole context: nothing of it runs any more
        self.memory.close()


class GpuDoorbells:
    """Doorbells as addresses that a GPU stores to.

    Parameters
    ----------
    gpu
        The GPU.
    controller
        Whose doorbells they are.
    queue_ids
        Of which queues.
    wanted
        ``"direct"``: the registers themselves; ``"forward"``: words of page-locked memory whose values a thread takes
        to the registers; ``"auto"``: direct where that works.

    Raises
    ------
    PathError
        If the direct way was asked for and cannot be used.
    """

    def __init__(self, gpu: Gpu, controller: Controller, queue_ids: list[int], wanted: str) -> None:
        if wanted not in DOORBELLS:
            raise ValueError(f"doorbell is {', '.join(map(repr, DOORBELLS))}, not {wanted!r}")
        self._gpu = gpu
        self._transport = controller.transport
        self._stride = 4 << controller.registers.cap.dstrd
        self._queue_ids = queue_ids
        self._page = 0
        self._forwarder: _Forwarder | None = None
        why = "it was asked for"
        if wanted != "forward":
            why = self._map()
            if why and wanted == "direct":
                raise PathError(f"the GPU cannot ring the doorbells of {self._transport.uri} itself: {why}")
        self.kind = "forward" if why else "direct"
        self.reason = f"forwarded by a host thread: {why}" if why else "rung by the GPU itself"
        if why:
            self._forwarder = _Forwarder(gpu, self._transport, [self._offset(index) for index in self._indices()])

    def _indices(self) -> list[int]:
        return [2 * queue_id + side for queue_id in self._queue_ids for side in (0, 1)]

    def _offset(self, index: int) -> int:
        return index * self._stride

    def _map(self) -> str:
        """Let the GPU reach the registers; why not, if it cannot."""
        doorbells = self._transport.doorbells
        if doorbells is None:
            return "they can only be written as registers"
        last = self._offset(max(self._indices())) + 4
        room = getattr(self._transport, "doorbells_nbytes", None)
        if room is not None and last > room:
            return f"only {room} bytes of them can be mapped"
        start, nbytes = page_range(doorbells, last)
        try:
            base = _registered.add(self._gpu, start, nbytes, may_be_io=True)
        except CudaError as error:
            return f"CUDA does not map them ({error})"
        self._page = start
        self._base = base + doorbells - start
        return ""

    def addresses(self, queue_id: int) -> tuple[int, int]:
        """For the GPU: a queue's tail doorbell, and its head doorbell."""
        if self._forwarder is not None:
            at = 2 * self._queue_ids.index(queue_id)
            return self._forwarder.gpu_address(at), self._forwarder.gpu_address(at + 1)
        return self._base + self._offset(2 * queue_id), self._base + self._offset(2 * queue_id + 1)

    def forget(self) -> None:
        """After a reset all doorbells are zero again. No kernel rings meanwhile."""
        if self._forwarder is not None:
            self._forwarder.forget()

    def stop(self) -> None:
        """Forward nothing more."""
        if self._forwarder is not None:
            self._forwarder.stop()

    def close(self) -> None:
        """Let go of them. Only when no kernel rings any more. Does nothing the second time."""
        self.stop()
        page, self._page = self._page, 0
        forwarder, self._forwarder = self._forwarder, None
        try:
            if page:
                _registered.remove(self._gpu, page)
            if forwarder is not None:
                forwarder.free()
        except CudaError:
            pass  # a kernel failed, and with it the whole context: nothing of it runs any more


class _Forwarder:
    """A thread that takes what a GPU stores in page-locked words to registers.

    A doorbell holds the latest value only, so values may be skipped, never reordered. What the GPU wrote before it
    stored a word is visible to whoever sees the word: its fence says so, and x86 keeps the order.
    """

    _EAGER = 0.002  # seconds that it looks all the time for after the last doorbell
    _NAP = 0.0001

    def __init__(self, gpu: Gpu, transport: Transport, offsets: list[int]) -> None:
        self._gpu = gpu
        self._transport = transport
        self._offsets = offsets
        self._host, self._device = gpu.allocate_host(PAGE)
        self._words = (ctypes.c_uint32 * len(offsets)).from_address(self._host)
        self._seen = [0] * len(offsets)
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="gpunvme-gpu-doorbells", daemon=True)
        self._thread.start()

    def gpu_address(self, index: int) -> int:
        return self._device + 4 * index

    def _run(self) -> None:
        latest = time.monotonic()
        while not self._ended.is_set():
            try:
                if self._pass_on():
                    latest = time.monotonic()
            except NvmeError:
                return  # the controller is gone: the watcher finds out by the same transport
            time.sleep(0 if time.monotonic() - latest < self._EAGER else self._NAP)

    def _pass_on(self) -> bool:
        with self._lock:
            new = [(at, value) for at, value in enumerate(self._words) if value != self._seen[at]]
            for at, value in new:
                self._store(self._offsets[at], value)
                self._seen[at] = value
        return bool(new)

    def _store(self, offset: int, value: int) -> None:
        if self._transport.doorbells is None:
            self._transport.write_register(0x1000 + offset, 4, value)
        else:
            ctypes.c_uint32.from_address(self._transport.doorbells + offset).value = value

    def forget(self) -> None:
        with self._lock:
            ctypes.memset(self._host, 0, 4 * len(self._offsets))
            self._seen = [0] * len(self._offsets)

    def stop(self) -> None:
        self._ended.set()
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=5)

    def free(self) -> None:
        self._gpu.free_host(self._host)
