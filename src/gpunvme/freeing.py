"""GPU memory that nobody uses any more, freed while no kernel that moves data runs there.

``cuMemFree`` waits for every kernel on its GPU, and keeps other threads' calls waiting meanwhile. Kernels that drive a
controller may need the host for their own end: the thread that watches them, a doorbell that is forwarded, a controller
in software. And Python frees when it collects garbage, in any thread, at any time.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable

from gpunvme import _native

# Nothing here may wait for a lock: the garbage collector may call from within whatever a thread does. Each operation on
# these is one step under the interpreter's lock.
_running: dict[int, tuple[int, Callable[[], bool]]] = {}
_waiting: deque[tuple[int, int]] = deque()


def ask_before_freeing(device: int, running: Callable[[], bool]) -> Callable[[], None]:
    """Free nothing on a GPU while ``running()`` says that kernels run there; what is returned ends that.

    Parameters
    ----------
    device
        Number of the GPU.
    running
        Called in any thread, while that holds any lock.
    """
    key = id(running)
    _running[key] = device, running  # which keeps it, and with it its number

    def end() -> None:
        _running.pop(key, None)
        free_what_waits()

    return end


def free_gpu(device: int, pointer: int) -> None:
    """Free memory of `_native.gpu_allocate`: now, or with the next call of anything here when no kernel runs."""
    _waiting.append((device, pointer))
    free_what_waits()


def free_what_waits() -> None:
    """Free what could not be freed before, as far as it can be now."""
    for _ in range(len(_waiting)):
        try:
            device, pointer = _waiting.popleft()
        except IndexError:
            return  # another thread was faster
        if any(running() for where, running in list(_running.values()) if where == device):
            _waiting.append((device, pointer))
            continue
        try:
            _native.gpu_free(device, pointer)
        except _native.Failure:
            pass  # the context, and the memory with it, is gone already


def _after_fork_in_child() -> None:
    _running.clear()  # the parent's
    _waiting.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)
