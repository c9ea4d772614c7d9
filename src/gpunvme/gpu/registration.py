"""Memory of this process that is page-locked for GPUs, or mapped for them where it is a device's."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from gpunvme.errors import CudaError
from gpunvme.gpu.driver import Gpu


@dataclass(slots=True)
class _Registration:
    owner: Gpu  # in whose context it was made, and is undone
    users: int = 0
    addresses: dict[int, int] = field(default_factory=dict)  # for each GPU that has used it


class Registrations:
    """Memory that is page-locked for GPUs, counted: doorbells of several queues share a page, also of several GPUs.

    The driver registers memory once in a process, for all GPUs; each has its own address for it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._registered: dict[int, _Registration] = {}  # by address

    def add(self, gpu: Gpu, address: int, nbytes: int, *, may_be_io: bool) -> int:
        """Page-lock memory, or count one more user; its address for the GPU. ``may_be_io``: it may be a BAR.

        Who names the same address names the same memory: always as many bytes.
        """
        with self._lock:
            found = self._registered.get(address)
            if found is None:
                try:
                    seen = gpu.register(address, nbytes)
                except CudaError:
                    if not may_be_io:
                        raise
                    seen = gpu.register(address, nbytes, io=True)
                found = self._registered[address] = _Registration(gpu, addresses={gpu.index: seen})
            elif gpu.index not in found.addresses:
                found.addresses[gpu.index] = gpu.address_of_host(address)
            found.users += 1
            return found.addresses[gpu.index]

    def remove(self, address: int) -> None:
        """One user less."""
        with self._lock:
            found = self._registered[address]
            found.users -= 1
            if not found.users:
                del self._registered[address]
                found.owner.unregister(address)


registrations = Registrations()
