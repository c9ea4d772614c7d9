"""GPU memory that cuFile has registered, and the care that no registration outlives its memory.

To register memory takes longer than to read a little into it, and the GPU's window for it is small: so memory is
registered when it is used for the second time, and the least recently used is let go. A registration whose memory was
freed still names the old pages. If the address is handed out again, a read would go to those. Each use therefore asks
the driver for the number of the allocation (CU_POINTER_ATTRIBUTE_BUFFER_ID), which is never given twice.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from dataclasses import dataclass

from gpunvme.cufile import library
from gpunvme.cufile.cuda import Context
from gpunvme.cufile.driver import before_close
from gpunvme.errors import Error

# Smaller ones are copied by cuFile at no cost that would show.
SMALLEST = 64 << 10
MOST_REGISTERED = 64
_MOST_REMEMBERED = 4096


@dataclass(slots=True)
class _Registration:
    address: int
    nbytes: int
    allocation: int
    context: Context
    users: int = 0

    def overlaps(self, address: int, nbytes: int) -> bool:
        """Whether it has a byte of a range."""
        return self.address < address + nbytes and address < self.address + self.nbytes


class Hold:
    """Memory in use by a transfer, registered or not; `release` it when nothing of it is in flight."""

    __slots__ = ("_registration", "_registry", "problem", "taken")

    def __init__(
        self,
        registry: Registrations,
        registration: _Registration | None,
        problem: str = "",
        taken: frozenset[int] = frozenset(),
    ) -> None:
        self._registry = registry
        self._registration = registration
        self.problem = problem
        self.taken = taken  # where registrations begin that others use, and that end before this memory does

    @property
    def registered(self) -> int:
        """Where the registration begins that the memory lies in; 0 where it is not registered."""
        return 0 if self._registration is None else self._registration.address

    def release(self) -> None:
        """It is in use no more."""
        registration, self._registration = self._registration, None
        if registration is not None:
            self._registry.release(registration)


class Registrations:
    """All registrations of this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._registered: OrderedDict[int, _Registration] = OrderedDict()
        self._seen: OrderedDict[int, tuple[int, int]] = OrderedDict()  # address: size and allocation of its last use

    def hold(self, context: Context, address: int, nbytes: int) -> Hold:
        """Say that memory is about to be used.

        Parameters
        ----------
        context
            The GPU that it is on.
        address, nbytes
            The range.
        """
        allocation = context.buffer_id(address) if nbytes else None
        with self._lock, context.current():
            self._forget_stale(address, nbytes, allocation)
            if allocation is None:
                return Hold(self, None)
            overlapping = [each for each in self._registered.values() if each.overlaps(address, nbytes)]
            for each in overlapping:
                if each.address <= address and address + nbytes <= each.address + each.nbytes:
                    self._registered.move_to_end(each.address)
                    each.users += 1
                    return Hold(self, each)
            # A request that begins where a shorter registration does would be too long for it.
            for each in overlapping:
                if not each.users:
                    self._deregister(each)
            taken = frozenset(each.address for each in overlapping if each.users)
            if taken or nbytes < SMALLEST or self._first_use(address, nbytes, allocation):
                return Hold(self, None, taken=taken)
            return self._register(context, address, nbytes, allocation)

    def _first_use(self, address: int, nbytes: int, allocation: int) -> bool:
        again = self._seen.pop(address, None)
        self._seen[address] = (nbytes, allocation)
        if len(self._seen) > _MOST_REMEMBERED:
            self._seen.popitem(last=False)
        return again is None or again[1] != allocation or again[0] < nbytes

    def _register(self, context: Context, address: int, nbytes: int, allocation: int) -> Hold:
        idle = [each for each in self._registered.values() if not each.users]
        for each in idle[: max(0, len(self._registered) + 1 - MOST_REGISTERED)]:
            self._deregister(each)
        try:
            library.call("buf_register", address, nbytes, 0)
        except Error as error:
            return Hold(self, None, f"the memory is not registered with cuFile ({error})")
        made = self._registered[address] = _Registration(address, nbytes, allocation, context, 1)
        return Hold(self, made)

    def _forget_stale(self, address: int, nbytes: int, allocation: int | None) -> None:
        """Deregister what was here before this memory was."""
        for each in list(self._registered.values()):
            if each.overlaps(address, nbytes) and each.allocation != allocation:
                self._deregister(each)

    def _deregister(self, registration: _Registration) -> None:
        del self._registered[registration.address]
        with registration.context.current():  # whichever GPU's memory makes room for whose
            try:
                library.call("buf_deregister", registration.address)
            except Error:
                pass  # cuFile has noticed by itself that the memory is gone

    def release(self, registration: _Registration) -> None:
        """One user less."""
        with self._lock:
            registration.users -= 1

    def close(self) -> bool:
        """Deregister all; whether none was in use."""
        with self._lock:
            for each in list(self._registered.values()):
                if not each.users:
                    self._deregister(each)
            return not self._registered

    def __len__(self) -> int:
        return len(self._registered)


REGISTRATIONS = Registrations()


def _after_fork_in_child() -> None:
    global REGISTRATIONS
    REGISTRATIONS = Registrations()


before_close(REGISTRATIONS.close)
os.register_at_fork(after_in_child=_after_fork_in_child)
