"""Doorbells: where a driver says how far it has filled a submission queue or emptied a completion queue.

The tail doorbell of submission queue *y* is at 1000h + 2y·(4 << CAP.DSTRD), and the head doorbell of completion queue
*y* one stride behind it (NVMe over PCIe 1.0, section 3.1.2).
"""

from __future__ import annotations

import ctypes
import threading
import time
import weakref
from typing import Protocol

from gpunvme.errors import NvmeError

FIRST = 0x1000

# How long the forwarding thread keeps looking after the last doorbell before it begins to sleep, and how long it then
# sleeps at a time, in seconds.
_EAGER = 0.001
_NAP = 0.00005


class _Registers(Protocol):
    doorbells: int | None
    doorbells_nbytes: int

    def write_register(self, offset: int, nbytes: int, value: int) -> None: ...


class Doorbells:
    """The doorbells of one controller, as addresses that native code and GPUs can store to.

    Where the transport cannot map them, they are words of ordinary memory, and a thread forwards what is stored there
    by register writes. A doorbell holds the latest value only, so values may be skipped, never reordered.

    Parameters
    ----------
    transport
        The way to the controller.
    stride_exponent
        CAP.DSTRD.
    queues
        Number of queue pairs, with the admin queues.
    """

    def __init__(self, transport: _Registers, stride_exponent: int, queues: int) -> None:
        self._transport = transport
        self._stride = 4 << stride_exponent
        self._forwarder: _Forwarder | None = None
        self._mapped = transport.doorbells
        if transport.doorbells_nbytes < 2 * queues * self._stride:
            self._mapped = None  # some would lie outside of what is mapped
        if self._mapped is None:
            self._forwarder = _Forwarder(transport, self._stride, 2 * queues)

    @property
    def forwarded(self) -> bool:
        """Whether a thread forwards them."""
        return self._forwarder is not None

    def submission(self, queue_id: int) -> int:
        """Address of a submission queue's tail doorbell."""
        return self._address(2 * queue_id)

    def completion(self, queue_id: int) -> int:
        """Address of a completion queue's head doorbell."""
        return self._address(2 * queue_id + 1)

    def _address(self, index: int) -> int:
        if self._forwarder is not None:
            return self._forwarder.address + 4 * index
        assert self._mapped is not None
        return self._mapped + index * self._stride

    def ring_submission(self, queue_id: int, tail: int) -> None:
        """Say where the submission queue ends now."""
        self._ring(2 * queue_id, tail)

    def ring_completion(self, queue_id: int, head: int) -> None:
        """Say which completions were taken."""
        self._ring(2 * queue_id + 1, head)

    def _ring(self, index: int, value: int) -> None:
        # One 4-byte store; what was written to queue memory before is visible before it: x86 keeps stores in order.
        if self._mapped is None:
            self._transport.write_register(FIRST + index * self._stride, 4, value)
        else:
            ctypes.c_uint32.from_address(self._address(index)).value = value

    def forget(self) -> None:
        """After a reset, all doorbells are zero again."""
        if self._forwarder is not None:
            self._forwarder.forget()

    def close(self) -> None:
        """Stop forwarding."""
        if self._forwarder is not None:
            self._forwarder.stop()


class _Forwarder:
    """A thread that writes to registers what others store in memory."""

    def __init__(self, transport: _Registers, stride: int, count: int) -> None:
        self._words = (ctypes.c_uint32 * count)()
        self._seen = [0] * count
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self.address = ctypes.addressof(self._words)
        self._thread = threading.Thread(
            target=_forward, args=(weakref.ref(self), transport, stride), name="gpunvme-doorbells", daemon=True
        )
        self._thread.start()

    def pass_on(self, transport: _Registers, stride: int) -> bool:
        """Write what is new; whether anything was."""
        with self._lock:
            new = [(i, value) for i, value in enumerate(self._words) if value != self._seen[i]]
            for index, value in new:
                transport.write_register(FIRST + index * stride, 4, value)
                self._seen[index] = value
        return bool(new)

    def forget(self) -> None:
        with self._lock:
            ctypes.memset(self._words, 0, ctypes.sizeof(self._words))
            self._seen = [0] * len(self._seen)

    def stop(self) -> None:
        self._ended.set()
        self._thread.join(timeout=5)

    @property
    def ended(self) -> bool:
        return self._ended.is_set()


def _forward(reference: weakref.ref[_Forwarder], transport: _Registers, stride: int) -> None:
    latest = time.monotonic()
    while True:
        forwarder = reference()
        if forwarder is None or forwarder.ended:
            return
        try:
            if forwarder.pass_on(transport, stride):
                latest = time.monotonic()
        except NvmeError:
            return  # the controller is gone: who waits for completions finds out by the same transport
        del forwarder
        time.sleep(0 if time.monotonic() - latest < _EAGER else _NAP)
