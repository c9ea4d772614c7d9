"""One load of a checkpoint into PyTorch's GPU memory: its time, its memory, and whether the tensors are right."""

from __future__ import annotations

import gc
import json
import os
import random
import time
from collections.abc import Callable
from typing import Any

import torch

from gpunvme.bench.contest import WrongBytes

_compared: set[tuple[str, ...]] = set()

torch.cuda.init()
torch.empty(1, device="cuda")


def headers(files: list[str]) -> dict[str, tuple[str, int, int]]:
    """Return where each tensor lies: name to (file, first byte, end).

    Parameters
    ----------
    files : list of str
        safetensors files.

    Returns
    -------
    dict
    """
    found = {}
    for name in files:
        with open(name, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        for tensor, about in header.items():
            if tensor != "__metadata__":
                begin, end = about["data_offsets"]
                found[tensor] = (name, 8 + length + begin, 8 + length + end)
    return found


def measure(load: Callable[[], Any], files: list[str]) -> dict[str, Any]:
    """Load once. The first load of a checkpoint is compared with its files, outside the timing.

    Parameters
    ----------
    load : callable
        Returns ``{name: tensor}``, or ``({name: tensor}, keep)`` with what has to stay alive as long as they do.
    files : list of str
        The checkpoint.

    Returns
    -------
    dict
        ``seconds``; ``nbytes`` of the files; ``peak_bytes`` of PyTorch's allocator over what it held before;
        ``device_bytes`` by which the GPU's memory in use has grown.
    """
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held, free = torch.cuda.memory_allocated(), torch.cuda.mem_get_info()[0]
    start = time.perf_counter()
    result = load()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    answer = {
        "seconds": seconds,
        "nbytes": sum(os.path.getsize(name) for name in files),
        "peak_bytes": torch.cuda.max_memory_allocated() - held,
        "device_bytes": free - torch.cuda.mem_get_info()[0],
    }
    if tuple(files) not in _compared:
        _compare(result[0] if isinstance(result, tuple) else result, headers(files))
        _compared.add(tuple(files))
    if isinstance(result, tuple):
        for keeper in result[1]:
            keeper.close()
    del result
    gc.collect()
    torch.cuda.empty_cache()
    return answer


def allocate(files: list[str]) -> dict[str, Any]:
    """Allocate the memory of a checkpoint's tensors and read nothing.

    Parameters
    ----------
    files : list of str
        The checkpoint.

    Returns
    -------
    dict
        ``seconds``; ``nbytes`` of the files.
    """
    sizes = [end - begin for _, begin, end in headers(files).values()]
    device = torch.device("cuda:0")
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    start = time.perf_counter()
    tensors = [torch.empty(nbytes, dtype=torch.uint8, device=device) for nbytes in sizes]
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    del tensors
    torch.cuda.empty_cache()
    return {"seconds": seconds, "nbytes": sum(os.path.getsize(name) for name in files)}


def _compare(tensors: dict[str, torch.Tensor], places: dict[str, tuple[str, int, int]]) -> None:
    if tensors.keys() != places.keys():
        raise WrongBytes(f"{len(tensors)} tensors were loaded, the files hold {len(places)}")
    for name in random.Random(1).sample(sorted(places), min(8, len(places))):
        path, begin, end = places[name]
        held = tensors[name].contiguous().view(-1).view(torch.uint8).cpu().numpy().tobytes()
        with open(path, "rb") as file:
            file.seek(begin)
            if file.read(end - begin) != held:
                raise WrongBytes(f"tensor {name!r} is not what {path} holds")
        if not tensors[name].is_cuda:
            raise WrongBytes(f"tensor {name!r} is not on the GPU")
