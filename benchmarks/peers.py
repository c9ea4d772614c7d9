"""What people use today, each at its best settings that we know of. Each says its version, or why it is not here.

Every class is made inside a process of its own (`worker.py`), so that importing one costs nobody else anything.
"""

from __future__ import annotations

import importlib.metadata
import os
import time
from collections.abc import Callable
from typing import Any

from gpunvme.bench.contestants import random_offsets
from gpunvme.bench.samples import compare_gathered, compare_read

MIB = 1 << 20


def version(distribution: str) -> str:
    """Return the version of an installed distribution."""
    return importlib.metadata.version(distribution)


def fsync(path: str) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# ---- files


class Kvikio:
    """KvikIO in compatibility mode (there is no GPUDirect Storage on most machines), on a thread pool."""

    def __init__(self, threads: int = 16, task: int = 16 * MIB, direct: bool = False) -> None:
        import cupy
        import kvikio
        import kvikio.defaults

        self._cupy, self._kvikio = cupy, kvikio
        self._settings: dict[str, Any] = {
            "num_threads": threads,
            "task_size": task,
            "compat_mode": kvikio.CompatMode.ON,
            "auto_direct_io_read": direct,
            "auto_direct_io_write": direct,
        }
        kvikio.defaults.set(self._settings)
        self._to: Any = None

    def about(self) -> dict[str, Any]:
        said = {name: str(value) for name, value in self._settings.items()}
        return {"version": version("kvikio-cu13"), "settings": ", ".join(f"{k}={v}" for k, v in said.items())}

    def prepare(self, nbytes: int) -> None:
        self._to = None
        self._cupy.get_default_memory_pool().free_all_blocks()
        self._to = self._cupy.empty(nbytes, dtype=self._cupy.uint8)
        self._cupy.cuda.runtime.deviceSynchronize()

    def poison(self) -> None:
        self._to.fill(0xA5)
        self._cupy.cuda.runtime.deviceSynchronize()

    def read(self, path: str, nbytes: int) -> dict[str, Any]:
        part = self._to[:nbytes]
        start = time.perf_counter()
        with self._kvikio.CuFile(path, "r") as file:
            got = file.read(part)
        self._cupy.cuda.runtime.deviceSynchronize()
        seconds = time.perf_counter() - start
        if got != nbytes:
            raise EOFError(f"{got} of {nbytes} bytes were read")
        return {"seconds": seconds, "nbytes": nbytes}

    def check(self, path: str, nbytes: int) -> None:
        compare_read(path, nbytes, self._fetch)

    def write(self, path: str, nbytes: int) -> dict[str, Any]:
        part = self._to[:nbytes]
        start = time.perf_counter()
        with self._kvikio.CuFile(path, "w") as file:
            file.write(part)
        fsync(path)
        return {"seconds": time.perf_counter() - start, "nbytes": nbytes}

    def gather(self, path: str, file_bytes: int, block: int, count: int, seed: int) -> dict[str, Any]:
        """One future a block: there is no call for many."""
        offsets = random_offsets(file_bytes, block, count, seed)
        parts = [self._to[index * block : (index + 1) * block] for index in range(count)]
        with self._kvikio.CuFile(path, "r") as file:
            start = time.perf_counter()
            futures = [
                file.pread(part, size=block, file_offset=offset)
                for part, offset in zip(parts, offsets.tolist(), strict=True)
            ]
            for future in futures:
                future.get()
            self._cupy.cuda.runtime.deviceSynchronize()
            seconds = time.perf_counter() - start
        return {"seconds": seconds, "nbytes": count * block}

    def check_gather(self, path: str, file_bytes: int, block: int, count: int, seed: int) -> None:
        compare_gathered(path, random_offsets(file_bytes, block, count, seed), block, self._fetch)

    def _fetch(self, offset: int, nbytes: int) -> bytes:
        return bytes(self._to[offset : offset + nbytes].get().tobytes())


class NumpyTorch:
    """What a PyTorch program does without any library for it: NumPy reads or maps, ``.to("cuda")`` copies."""

    def __init__(self, way: str) -> None:
        import numpy
        import torch

        self._numpy, self._torch, self._way = numpy, torch, way
        torch.cuda.init()
        torch.empty(1, device="cuda")
        self._result: Any = None
        self._mapped: tuple[str, Any] | None = None
        self._pinned: Any = None

    def about(self) -> dict[str, Any]:
        return {
            "version": f"torch {self._torch.__version__}, numpy {self._numpy.__version__}",
            "settings": f"{self._torch.get_num_threads()} threads where PyTorch uses threads",
        }

    def prepare(self, nbytes: int) -> None:
        if self._way == "index_select":
            self._pinned = self._torch.empty(nbytes, dtype=self._torch.uint8).pin_memory()

    def poison(self) -> None:
        self._result = None

    def read(self, path: str, nbytes: int) -> dict[str, Any]:
        self._result = None
        start = time.perf_counter()
        if self._way == "fromfile":
            host = self._numpy.fromfile(path, dtype=self._numpy.uint8, count=nbytes)
        else:
            host = self._numpy.memmap(path, dtype=self._numpy.uint8, mode="c")[:nbytes]
        self._result = self._torch.from_numpy(host).to("cuda")
        self._torch.cuda.synchronize()
        return {"seconds": time.perf_counter() - start, "nbytes": nbytes}

    def write(self, path: str, nbytes: int) -> dict[str, Any]:
        source = self._torch.empty(nbytes, dtype=self._torch.uint8, device="cuda")
        self._torch.cuda.synchronize()
        start = time.perf_counter()
        source.cpu().numpy().tofile(path)
        fsync(path)
        return {"seconds": time.perf_counter() - start, "nbytes": nbytes}

    def check(self, path: str, nbytes: int) -> None:
        compare_read(path, nbytes, self._fetch)

    def gather(self, path: str, file_bytes: int, block: int, count: int, seed: int) -> dict[str, Any]:
        """Index a mapping that stays, or ``index_select`` out of it into page-locked memory; then copy."""
        numpy, torch = self._numpy, self._torch
        rows = random_offsets(file_bytes, block, count, seed) // block
        if self._mapped is None or self._mapped[0] != path:
            mapping = numpy.memmap(path, dtype=numpy.uint8, mode="c")
            self._mapped = (path, mapping[: file_bytes // block * block].reshape(-1, block))
        table = self._mapped[1]
        self._result = None
        start = time.perf_counter()
        if self._way == "index_select":
            out = self._pinned[: count * block].view(count, block)
            torch.index_select(torch.from_numpy(table), 0, torch.from_numpy(rows), out=out)
            result = out.to("cuda", non_blocking=True)
        else:
            result = torch.from_numpy(table[rows]).to("cuda")
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        self._result = result.view(-1)
        return {"seconds": seconds, "nbytes": count * block}

    def forget(self) -> None:
        """Unmap the file: a mapped file cannot become cold."""
        self._mapped = None

    def check_gather(self, path: str, file_bytes: int, block: int, count: int, seed: int) -> None:
        compare_gathered(path, random_offsets(file_bytes, block, count, seed), block, self._fetch)

    def _fetch(self, offset: int, nbytes: int) -> bytes:
        return bytes(self._result[offset : offset + nbytes].cpu().numpy().tobytes())


# ---- checkpoints


class _Loader:
    """Loads all tensors of some safetensors files onto the GPU."""

    distribution = ""
    settings = ""

    def __init__(self) -> None:
        import loading

        self._loading = loading

    def about(self) -> dict[str, Any]:
        return {"version": version(self.distribution), "settings": self.settings}

    def load(self, files: list[str]) -> dict[str, Any]:
        return self._loading.measure(self._load(files), files)

    def _load(self, files: list[str]) -> Callable[[], Any]:
        raise NotImplementedError


class Safetensors(_Loader):
    """safetensors itself."""

    distribution, settings = "safetensors", "load_file(file, device='cuda'), file after file"

    def __init__(self) -> None:
        super().__init__()
        from safetensors.torch import load_file

        self._load_file = load_file

    def _load(self, files: list[str]) -> Callable[[], Any]:
        return lambda: {name: t for file in files for name, t in self._load_file(file, device="cuda").items()}


class Runai(_Loader):
    """Run:ai Model Streamer: threads read into host memory, the caller copies."""

    distribution = "runai-model-streamer"

    def __init__(self, threads: int = 16) -> None:
        os.environ["RUNAI_STREAMER_CONCURRENCY"] = str(threads)
        self.settings = f"RUNAI_STREAMER_CONCURRENCY={threads}, each tensor .to('cuda')"
        super().__init__()
        from runai_model_streamer import SafetensorsStreamer

        self._streamer = SafetensorsStreamer

    def _load(self, files: list[str]) -> Callable[[], Any]:
        def load() -> Any:
            with self._streamer() as streamer:
                streamer.stream_files(files)
                return {name: tensor.to("cuda") for name, tensor in streamer.get_tensors()}

        return load


class Fastsafetensors(_Loader):
    """fastsafetensors without GPUDirect Storage; O_DIRECT is its default, buffered reads are faster when hot."""

    distribution = "fastsafetensors"

    def __init__(self, direct: bool, threads: int = 16) -> None:
        os.environ["FASTSAFETENSORS_ODIRECT"] = str(int(direct))
        self._threads = threads
        self.settings = f"nogds, FASTSAFETENSORS_ODIRECT={int(direct)}, max_threads={threads}"
        super().__init__()
        import torch
        from fastsafetensors import SafeTensorsFileLoader, SingleGroup

        self._torch, self._made, self._group = torch, SafeTensorsFileLoader, SingleGroup

    def _load(self, files: list[str]) -> Callable[[], Any]:
        def load() -> Any:
            loader = self._made(self._group(), self._torch.device("cuda:0"), nogds=True, max_threads=self._threads)
            loader.add_filenames({0: files})
            held = loader.copy_files_to_device()
            return {name: held.get_tensor(name) for name in loader.get_keys()}, (held, loader)

        return load


class Instanttensor(_Loader):
    """InstantTensor; O_DIRECT is its default, its buffered backends are faster when hot."""

    distribution = "instanttensor"

    def __init__(self, buffered: bool) -> None:
        self.settings = "backend=BackendPolicy.BUFFERED" if buffered else "its default backend (O_DIRECT on a drive)"
        super().__init__()
        from instanttensor import BackendPolicy, safe_open

        self._safe_open = safe_open
        self._backend = BackendPolicy.BUFFERED if buffered else None

    def _load(self, files: list[str]) -> Callable[[], Any]:
        def load() -> Any:
            with self._safe_open(list(files), framework="pt", device=0, backend=self._backend) as opened:
                return dict(opened.tensors())

        return load
