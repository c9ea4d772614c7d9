"""Doorbells that a GPU rings: the registers themselves, or words that a thread takes to them."""

from __future__ import annotations

import ctypes
import threading
import time
from typing import TYPE_CHECKING

from gpunvme.errors import CudaError, NvmeError, PathError
from gpunvme.gpu.driver import Gpu
from gpunvme.gpu.registration import registrations
from gpunvme.nvme.dma import PAGE, page_range

if TYPE_CHECKING:
    from gpunvme.nvme.controller import Controller
    from gpunvme.nvme.transport import Transport

DOORBELLS = ("auto", "direct", "forward")


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
        self._pages: dict[int, int] = {}  # of the registers: start, and the GPU's address
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
        # Page by page: other queues', maybe another GPU's, may share some of these pages and not all.
        try:
            for index in self._indices():
                page, _ = page_range(doorbells + self._offset(index), 4)
                if page not in self._pages:
                    self._pages[page] = registrations.add(self._gpu, page, PAGE, may_be_io=True)
        except CudaError as error:
            self._let_go()
            return f"CUDA does not map them ({error})"
        return ""

    def _let_go(self) -> None:
        while self._pages:
            registrations.remove(self._pages.popitem()[0])

    def _address(self, index: int) -> int:
        """Of a register, for the GPU."""
        assert self._transport.doorbells is not None
        address = self._transport.doorbells + self._offset(index)
        page, _ = page_range(address, 4)
        return self._pages[page] + address - page

    def addresses(self, queue_id: int) -> tuple[int, int]:
        """For the GPU: a queue's tail doorbell, and its head doorbell."""
        if self._forwarder is not None:
            at = 2 * self._queue_ids.index(queue_id)
            return self._forwarder.gpu_address(at), self._forwarder.gpu_address(at + 1)
        return self._address(2 * queue_id), self._address(2 * queue_id + 1)

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
        self._let_go()
        forwarder, self._forwarder = self._forwarder, None
        if forwarder is not None:
            forwarder.free()


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
