"""gpunvme and the limits of the machine, as contestants in processes of their own."""

from __future__ import annotations

import os
import time
from typing import Any

import gpunvme
from gpunvme import _native
from gpunvme.bench import contestants as who
from gpunvme.bench.contest import Contestant
from gpunvme.bench.destinations import Destination, HostDestination, destination, gpu_name
from gpunvme.bench.samples import compare_gathered, compare_read

MIB = 1 << 20


class Gpunvme:
    """This library, as a user calls it."""

    def __init__(self, device: str = "cuda:0", path: str = "auto") -> None:
        self._device = device
        self._path = path
        self._to: Destination | None = None
        self._kept: gpunvme.File | None = None

    @property
    def _destination(self) -> Destination:
        assert self._to is not None, "prepare() comes first"
        return self._to

    def about(self) -> dict[str, Any]:
        return {"version": gpunvme.__version__, "settings": "none" if self._path == "auto" else f"path={self._path}"}

    def prepare(self, nbytes: int) -> None:
        """Make the CUDA context and the destination: neither is part of a transfer."""
        if self._to is not None:
            self._to.close()
        self._to = destination(self._device, nbytes)

    def poison(self) -> None:
        self._destination.poison()

    def read(self, path: str, nbytes: int) -> dict[str, Any]:
        part = self._destination.part(0, nbytes)
        start = time.perf_counter()
        with gpunvme.open(path, path=self._path) as file:
            done = file.read_into(part)
            seconds = time.perf_counter() - start
        return {"seconds": seconds, "nbytes": nbytes, "path": done.path, "reason": done.reason}

    def check(self, path: str, nbytes: int) -> None:
        compare_read(path, nbytes, self._destination.fetch)

    def write(self, path: str, nbytes: int) -> dict[str, Any]:
        part = self._destination.part(0, nbytes)
        start = time.perf_counter()
        with gpunvme.open(path, "w", path=self._path) as file:
            done = file.write_from(part, fsync=True)
        return {
            "seconds": time.perf_counter() - start,
            "nbytes": nbytes,
            "path": done.path,
            "reason": done.reason,
        }

    def gather(self, path: str, file_bytes: int, block: int, count: int, seed: int, keep: bool) -> dict[str, Any]:
        """Gather random blocks; with ``keep`` the file stays open for the next time."""
        offsets = who.random_offsets(file_bytes, block, count, seed)
        part = self._destination.part(0, count * block)
        if self._kept is not None and not keep:
            self._kept.close()
            self._kept = None
        start = time.perf_counter()
        file = self._kept if self._kept is not None else gpunvme.open(path, path=self._path)
        try:
            file.gather(offsets, block, out=part)
            seconds = time.perf_counter() - start
            done = file.last_transfer
        finally:
            if not keep:
                file.close()
        self._kept = file if keep else None
        assert done is not None
        return {"seconds": seconds, "nbytes": count * block, "path": done.path, "reason": done.reason}

    def forget(self) -> None:
        """Close the file that was kept open: a mapped file cannot become cold."""
        if self._kept is not None:
            self._kept.close()
            self._kept = None

    def check_gather(self, path: str, file_bytes: int, block: int, count: int, seed: int) -> None:
        compare_gathered(path, who.random_offsets(file_bytes, block, count, seed), block, self._destination.fetch)


class Checkpoints:
    """`gpunvme.load_file`, into PyTorch's memory."""

    def __init__(self) -> None:
        import loading

        self._loading = loading

    def about(self) -> dict[str, Any]:
        return {"version": gpunvme.__version__, "settings": "load_file(files, device='cuda:0')"}

    def load(self, files: list[str]) -> dict[str, Any]:
        return self._loading.measure(lambda: gpunvme.load_file(files, device="cuda:0"), files)

    def allocate(self, files: list[str]) -> dict[str, Any]:
        """The tensors' memory alone: nothing is read."""
        return self._loading.allocate(files)


class Limits:
    """What the machine gives at most, and the plain readers of :mod:`gpunvme.bench`."""

    def __init__(self, device: str = "cuda:0") -> None:
        self._device = device
        self._host: HostDestination | None = None
        self._to: Destination | None = None

    def about(self) -> dict[str, Any]:
        about = {"version": gpunvme.__version__, "settings": "plain system calls and one plain copy"}
        if self._device != "cpu":
            about["gpu"] = gpu_name(self._device)
        return about

    def prepare(self, nbytes: int) -> None:
        if self._host is not None:
            self._host.close()
        self._host = HostDestination(nbytes)

    def prepare_gpu(self, nbytes: int) -> None:
        if self._to is not None:
            self._to.close()
        self._to = destination(self._device, nbytes)

    def _address(self) -> int:
        assert self._host is not None, "prepare() comes first"
        return self._host.window(0)

    def copy_ceiling(self, nbytes: int) -> dict[str, Any]:
        """A copy from page-locked memory to the GPU."""
        rate = float(_native.h2d_ceiling(int(self._device.partition(":")[2] or 0), nbytes))
        return {"seconds": nbytes / rate, "nbytes": nbytes}

    def direct_read(self, path: str, nbytes: int, chunk: int, depth: int) -> dict[str, Any]:
        """Raw O_DIRECT into host memory."""
        whole = nbytes // chunk * chunk
        return {"seconds": _native.direct_read(path, self._address(), whole, chunk, depth), "nbytes": whole}

    def direct_write(self, path: str, nbytes: int, depth: int) -> dict[str, Any]:
        """Space reserved, raw O_DIRECT from host memory, fsync."""
        assert self._host is not None, "prepare() comes first"
        run = who.direct_write(path, self._host, nbytes, depth).run()
        return {"seconds": run.seconds, "nbytes": run.nbytes}

    def direct_gather(
        self, path: str, file_bytes: int, block: int, count: int, seed: int, depth: int
    ) -> dict[str, Any]:
        """Raw O_DIRECT requests at random places, into host memory."""
        offsets = who.random_offsets(file_bytes, block, count, seed)
        seconds = _native.direct_read_random(path, self._address(), offsets, block, depth)
        return {"seconds": seconds, "nbytes": count * block}

    def buffered_read(self, path: str, nbytes: int, threads: int) -> dict[str, Any]:
        """Plain threads of pread through the page cache, into host memory."""
        fd = os.open(path, os.O_RDONLY)
        try:
            return {
                "seconds": _native.pread_sequential(fd, self._address(), nbytes, MIB, threads),
                "nbytes": nbytes,
            }
        finally:
            os.close(fd)

    def threads_gather(
        self, path: str, file_bytes: int, block: int, count: int, seed: int, way: str, threads: int
    ) -> dict[str, Any]:
        """Plain threads (pread, or memcpy from a mapping) into page-locked memory, then one copy to the GPU."""
        assert self._to is not None, "prepare_gpu() comes first"
        work = who.Random(path, self._to, block, who.random_offsets(file_bytes, block, count, seed))
        made: Contestant = (who.pread_random if way == "pread" else who.mmap_random)(work, threads)
        run = made.run()
        return {"seconds": run.seconds, "nbytes": run.nbytes}

    def poison(self) -> None:
        if self._to is not None:
            self._to.poison()

    def check_gather(self, path: str, file_bytes: int, block: int, count: int, seed: int) -> None:
        assert self._to is not None
        compare_gathered(path, who.random_offsets(file_bytes, block, count, seed), block, self._to.fetch)
