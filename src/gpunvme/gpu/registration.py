"""Memory of this process that is page-locked for a GPU, or mapped for it where it is a device's."""

from __future__ import annotations

import threading

from gpunvme.errors import CudaError
from gpunvme.gpu.driver import Gpu


class Registrations:
    """Memory that is page-locked for a GPU, counted: doorbells of several queues share a page."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users: dict[tuple[int, int], tuple[int, int]] = {}  # (gpu, address): users, address for the GPU

    def add(self, gpu: Gpu, address: int, nbytes: int, *, may_be_io: bool) -> int:
        """Page-lock memory, or count one more user; its address for the GPU. ``may_be_io``: it may be a BAR."""
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
        """One user less."""
        key = gpu.index, address
        with self._lock:
            users, seen = self._users.pop(key)
            if users > 1:
                self._users[key] = users - 1, seen
            else:
                gpu.unregister(address)


registrations = Registrations()
