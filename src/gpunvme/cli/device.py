"""What ``--device auto`` means."""

from __future__ import annotations

import importlib.util

from gpunvme.cli.exits import NotInstalledError


def resolve_device(device: str, *, tensors: bool = False) -> str:
    """Turn ``auto`` into the first GPU where there is one, else host memory.

    Parameters
    ----------
    device
        ``auto`` or any device that the library takes.
    tensors
        Whether tensors will be made, which only PyTorch can make on a GPU.

    Raises
    ------
    NotInstalledError
        Tensors on a GPU were asked for, and PyTorch is not installed.
    CudaError
        A GPU was asked for, and CUDA cannot be used here.
    """
    from gpunvme import _native
    from gpunvme.errors import CudaError

    reason = str(_native.cuda_unavailable_reason()) if device != "cpu" else ""
    torch = not tensors or importlib.util.find_spec("torch") is not None
    if device == "auto":
        return "cuda:0" if torch and not reason else "cpu"
    if device != "cpu":
        if reason:
            raise CudaError(f"{device} cannot be used: {reason}")
        if not torch:
            raise NotInstalledError(f"tensors on {device} need PyTorch: pip install torch")
    return device
