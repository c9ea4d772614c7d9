"""What ``--device auto`` means."""

from __future__ import annotations

import importlib.util

import typer

from gpunvme.cli.exits import NotInstalledError


def _torch_is_installed() -> bool:
    return importlib.util.find_spec("torch") is not None


def no_gpu_reason(*, tensors: bool = False) -> str:
    """Say why ``auto`` does not mean a GPU here; empty if it does."""
    from gpunvme import _native

    reason = _native.cuda_unavailable_reason()
    return reason if reason or not tensors or _torch_is_installed() else "PyTorch is not installed"


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
    typer.BadParameter
        It is no device.
    CudaError
        A GPU was asked for, and CUDA cannot be used here or has no such device.
    NotInstalledError
        Tensors on a GPU were asked for, and PyTorch is not installed.
    """
    from gpunvme import _native
    from gpunvme.errors import CudaError
    from gpunvme.memory import Device

    if device == "auto":
        return "cpu" if no_gpu_reason(tensors=tensors) else "cuda:0"
    try:
        wanted = Device.parse(device)
    except ValueError as error:
        raise typer.BadParameter(f"{device!r} is no device", param_hint="--device") from error
    if wanted.is_gpu:
        reason = _native.cuda_unavailable_reason()
        if reason:
            raise CudaError(f"{device} cannot be used: {reason}")
        count = len(_native.cuda_devices())
        if wanted.index >= count:
            raise CudaError(f"there is no {wanted}: CUDA shows {count} device(s), counted from 0")
        if tensors and not _torch_is_installed():
            raise NotInstalledError(f"tensors on {device} need PyTorch: pip install torch")
    return str(wanted)
