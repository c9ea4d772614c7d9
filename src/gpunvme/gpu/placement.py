"""Placements: where the memory of GPU queues lives, which of them a machine allows, and why not the others.

Tier 1, ``"host"``: queues and data in host memory. Tier 2, ``"data"``: data in GPU memory. Tier 3, ``"full"``: queues
and data in GPU memory. Tiers 2 and 3 need a transport that gives a controller addresses of GPU memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpunvme.errors import PathError
from gpunvme.gpu.driver import ORDERED_FOR_OWNER, Gpu
from gpunvme.nvme.gpu_memory import GPU_PAGE

if TYPE_CHECKING:
    from gpunvme.nvme.controller import Controller

PLACEMENTS = ("host", "data", "full")  # tier 1 first


def check_placement(wanted: str) -> None:
    """Raise ValueError if it is no placement."""
    if wanted != "auto" and wanted not in PLACEMENTS:
        raise ValueError(f"placement is 'auto', {', '.join(map(repr, PLACEMENTS))}, not {wanted!r}")


def candidates(controller: Controller, gpu: Gpu, wanted: str) -> tuple[list[str], dict[str, str]]:
    """The placements to be tried, best first, and why the others are not.

    Raises
    ------
    PathError
        If one that was asked for by name cannot be used.
    """
    access = controller.transport.gpu_access
    refusal = _refusal(controller, gpu)
    if wanted != "auto":
        if refusal and wanted != "host":
            raise PathError(f"placement {wanted!r} cannot be used on {controller.transport.uri}: {refusal}")
        higher = refusal or f"placement {wanted!r} was asked for"
        return [wanted], {name: higher for name in PLACEMENTS if name != wanted}
    if not refusal and access.kind == "emulated":
        refusal = f"only when asked for by name: {access.reason}"
    if refusal:
        return ["host"], dict.fromkeys(("data", "full"), refusal)
    return ["full", "data", "host"], {}


def _refusal(controller: Controller, gpu: Gpu) -> str:
    """Why no placement in GPU memory can be used, or an empty string."""
    access = controller.transport.gpu_access
    if access.kind == "none":
        return access.reason
    if controller.page_bytes > GPU_PAGE:
        return f"the controller's pages of {controller.page_bytes} bytes are larger than the GPU's of {GPU_PAGE}"
    # The copies of an emulation are ordered by their stream. A drive's own writes come over PCIe, and a kernel that
    # sees the completion must see the data, too.
    if access.kind == "direct" and gpu.writes_ordering() < ORDERED_FOR_OWNER:
        return (
            f"cuda:{gpu.index} does not order what others write into its memory for its own kernels "
            "(CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WRITES_ORDERING), so that a completion may come before its data"
        )
    return ""


_ORDERING = {0: "for nobody", ORDERED_FOR_OWNER: "for its own kernels", 200: "for every GPU"}


def describe_ordering(gpu: Gpu) -> str:
    """For whom a GPU orders what others write into its memory, for the reasons of placements there."""
    value = gpu.writes_ordering()
    whom = _ORDERING.get(value, f"in a way that is not known here ({value})")
    return f"cuda:{gpu.index} orders what others write into its memory {whom}"


def describe(placement: str, controller: Controller) -> str:
    """Where commands' data goes, for reports."""
    if placement == "host":
        return "data through page-locked host memory"
    access = controller.transport.gpu_access
    where = "data" if placement == "data" else "queues and data"
    how = f" ({access.reason})" if access.kind == "emulated" else ""
    return f"{where} in GPU memory{how}"
