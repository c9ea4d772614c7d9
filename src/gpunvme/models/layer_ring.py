"""The ring of slots: which layer is where, what is being read, and when a slot may be filled again.

There is no thread here. Reads go on in the engine; they are started when a layer is taken, and looked after while
somebody waits for one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

from gpunvme import _native, many
from gpunvme.errors import DeadlineExceeded, Error
from gpunvme.memory import Device
from gpunvme.models.layer_layout import LayerLayout
from gpunvme.transfer import Transfer, error_from_native

_T = TypeVar("_T")

# Two reads at a time: while one ends, the other keeps drive and copy engine busy. More would only delay the first.
_READS = 2
# How often somebody who waits for a read looks whether a slot has become free, in seconds.
_LOOK = 0.001


class StreamOrder:
    """Memory between whoever computes with it and whoever fills it, on a GPU in the order of streams.

    In host memory there is nothing to do: who gives a layer back has computed with it.
    """

    def __init__(self, device: Device) -> None:
        self._order: _native.HandOver | None = None
        if device.is_gpu:
            self._order = _native_call(_native.HandOver, device.index)

    @property
    def stream(self) -> int | None:
        """What fills the memory is put behind this stream."""
        return None if self._order is None else self._order.stream

    def follow(self, *streams: int | None) -> None:
        """Fill only behind what is queued on these streams now."""
        if self._order is not None:
            for stream in dict.fromkeys(streams):
                _native_call(self._order.follow, stream or 0)

    def passed(self) -> bool:
        """Whether all that was followed has happened."""
        if self._order is None:
            return True
        try:
            return self._order.passed()
        except _native.Failure:
            return True  # the GPU has failed: whatever is started now says so

    def fill(self, address: int, copy: HostCopy) -> None:
        """Copy from page-locked memory."""
        if self._order is not None:
            _native_call(self._order.fill, address, copy.memory.address, copy.nbytes)

    def lead(self, stream: int | None) -> None:
        """Let a stream go on behind the copies."""
        if self._order is not None:
            _native_call(self._order.lead, stream or 0)

    def wait(self) -> None:
        """Wait for all that was followed, and for the copies."""
        if self._order is not None:
            try:
                self._order.wait()
            except _native.Failure:
                pass  # the GPU has failed, and reads nothing any more
            self._order = None


class HostCopy:
    """A layer in page-locked host memory."""

    def __init__(self, layer: LayerLayout, device: Device) -> None:
        try:
            self.memory = _native_call(_native.PageLocked, device.index, layer.slot_bytes)
        except Error as error:
            error.add_note(f"while page-locking {layer.slot_bytes} bytes for layer {layer.name!r} under budget_host")
            raise
        self.nbytes = layer.slot_bytes


class Slot:
    """Memory for one layer at a time.

    Attributes
    ----------
    layer
        The layer whose bytes it has or gets; None if it has nothing that anybody may ask for.
    held
        Whether the layer is in the consumer's hands.
    used
        When it was last handed out, as a count.
    fresh
        Whether the layer was not handed out yet since it was filled.
    tier
        Where the layer came from: ``"source"`` or ``"host"``.
    """

    def __init__(self, memory: Any, base: int, device: Device, stream: int | None) -> None:
        self.memory = memory
        self.layer: int | None = None
        self.held = self.fresh = False
        self.used = 0
        self.tier = "source"
        self.tensors: dict[str, Any] = {}
        self._base = base
        self._device = device
        self._arrival: Transfer | None = None
        self._failure: Exception | None = None
        self._expires: float | None = None
        self._order = StreamOrder(device)
        # The memory may be another's whose kernels, queued on this stream, have not run yet.
        self._order.follow(stream)

    def start(self, layer: LayerLayout, copy: HostCopy | None, timeout: float | None) -> None:
        """Begin to fill it, behind what was queued when it was released. Errors come out of `arrived`."""
        self.layer, self.fresh, self._failure, self._arrival = layer.index, True, None, None
        self.tier = "source" if copy is None else "host"
        self._expires = None if timeout is None else time.monotonic() + timeout
        try:
            self.tensors = layer.tensors(self.memory)
            if copy is not None:
                self._order.fill(self._base, copy)
            elif layer.runs:
                parts = layer.parts(self._base, self._device, self.memory)
                self._arrival = many.read_many(parts, stream=self._order.stream, wait=False, timeout=timeout)
        except Error as error:
            self._failure = error

    def may_be_filled(self) -> bool:
        """Whether all kernels that read it have run."""
        return self._order.passed()

    @property
    def in_flight(self) -> bool:
        """Whether it is being read into."""
        return self._arrival is not None and not self._arrival.done

    def arrived(self, patience: float | None) -> Transfer | bool | None:
        """Wait for the layer; False if it has not come within ``patience`` seconds, else the read, if there was one.

        Raises
        ------
        Error
            Whatever it failed with.
        """
        if self._failure is not None:
            raise self._failure
        if self._arrival is None:
            return None
        try:
            return self._arrival.wait(patience)
        except DeadlineExceeded:
            if self._expires is not None and time.monotonic() >= self._expires:
                raise
            return False  # it was only the patience that came to its end

    def take(self, stream: int | None) -> None:
        """Hand it out: what is queued on ``stream`` from here on sees the layer."""
        if self.fresh and self.tier == "host":
            self._order.lead(stream)
        self.held, self.fresh = True, False

    def release(self, *streams: int | None) -> None:
        """Take it back: it is filled again only behind what is queued on these streams now."""
        self.held = False
        self._order.follow(*streams)

    def forget(self) -> None:
        """Give up what it has or gets."""
        self.layer = None
        self.tensors = {}
        self._failure = None
        self.cancel()

    def cancel(self) -> None:
        """Stop reading into it. Any thread may do so."""
        arrival = self._arrival
        if arrival is not None:
            arrival.cancel()

    def drain(self) -> None:
        """Wait until nothing writes into it."""
        if self._arrival is not None:
            try:
                self._arrival.wait()
            except Error:
                pass  # nobody asked for it
            if self._arrival.done:
                self._arrival = None

    def finish(self) -> None:
        """Wait until no kernel reads it and nothing writes into it."""
        self.drain()
        self._order.wait()


class Ring:
    """The slots of a loader.

    Parameters
    ----------
    slots
        Each empty.
    layers
        All layers.
    copies
        Those that are in page-locked host memory, by index.
    timeout
        Seconds that a read may take, or None.
    """

    def __init__(
        self, slots: list[Slot], layers: list[LayerLayout], copies: dict[int, HostCopy], timeout: float | None
    ) -> None:
        self.slots = slots
        self._layers = layers
        self._copies = copies
        self._timeout = timeout
        self._uses = 0

    def find(self, layer: int) -> Slot | None:
        """Return the slot that has the layer, or gets it."""
        return next((slot for slot in self.slots if slot.layer == layer), None)

    def fetch(self, layer: int) -> Slot:
        """Return the slot of a layer that is wanted now; its filling is begun if that was not foreseen."""
        slot = self.find(layer)
        if slot is None:
            slot = self._oldest(set()) or min(self.slots, key=lambda slot: slot.used)
            slot.forget()
            slot.drain()
            self._start(slot, layer)
        self._uses += 1
        slot.used = self._uses
        return slot

    def read_ahead(self, wanted: list[int], now: int) -> bool:
        """Begin to fill slots with what is wanted next; whether something waits for kernels to run.

        A read that is queued behind a kernel holds up the engine's other copies to that GPU. So while one of ours is in
        flight, no other one is started before the kernels that it comes behind have run.
        """
        keep = {now, *wanted}
        for layer in wanted:
            if self.find(layer) is not None:
                continue
            slot = self._oldest(keep)
            if slot is None:
                return False
            if layer not in self._copies:
                reads = sum(slot.in_flight for slot in self.slots)
                if reads >= _READS:
                    return False
                if reads and not slot.may_be_filled():
                    return True
            self._start(slot, layer)
        return False

    def wait(self, slot: Slot, wanted: list[int]) -> Transfer | None:
        """Wait for a slot's layer, and read ahead meanwhile. Raises whatever its read failed with."""
        layer = slot.layer
        assert layer is not None
        while True:
            waiting = self.read_ahead(wanted, layer)
            arrived = slot.arrived(_LOOK if waiting else None)
            if not isinstance(arrived, bool):
                self.read_ahead(wanted, layer)
                return arrived

    def forget_ahead(self) -> None:
        """Give up what was read ahead: after a failure it may have failed as well, for a reason that is gone."""
        for slot in self.slots:
            if slot.fresh and not slot.held:
                slot.forget()

    def close(self) -> None:
        """Wait until no kernel reads the slots and nothing writes into them, and give all memory back."""
        for slot in self.slots:
            slot.forget()
        while self.slots:
            self.slots.pop().finish()
        self._copies.clear()

    def abandon(self) -> None:
        """In a forked child: slots and what goes on in them are the parent's."""
        self.slots.clear()
        self._copies.clear()

    def _oldest(self, keep: set[int]) -> Slot | None:
        """Return the slot that can be filled and was not used for longest."""
        free = [slot for slot in self.slots if not (slot.held or slot.layer in keep or slot.in_flight)]
        return min(free, key=lambda slot: (slot.layer is not None, slot.used), default=None)

    def _start(self, slot: Slot, layer: int) -> None:
        slot.start(self._layers[layer], self._copies.get(layer), self._timeout)


def _native_call(function: Callable[..., _T], *arguments: Any) -> _T:
    try:
        return function(*arguments)
    except _native.Failure as failure:
        raise error_from_native(failure.args) from None
