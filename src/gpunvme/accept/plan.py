"""Which steps there are, in their order: every path and tier of docs/hardware.md."""

from __future__ import annotations

from gpunvme.accept.children import Step
from gpunvme.nvme.bind import KERNEL_DRIVER, OWN_DRIVER

VFIO_DRIVER = "vfio-pci"
_STEPS = "gpunvme.accept.steps."
_CUFILE = ("cufile/nvidia-fs", "cufile/p2pdma", "cufile/compat")
_TIERS = {"host": "tier 1: queues and data in host memory", "data": "tier 2: data in GPU memory"}
_TIERS["full"] = "tier 3: queues and data in GPU memory"


def _with_kernel() -> list[Step]:
    """Return the steps in which the kernel's driver has the drive."""

    def step(name: str, what: str, function: str, *, gpu: bool = False, vital: bool = False) -> Step:
        return Step(name, what, _STEPS + function, KERNEL_DRIVER, gpu=gpu, vital=vital)

    return [
        step("kernel", "block device, path host: written, read, compared", "kernel:write_and_read", vital=True),
        step("kernel to GPU", "block device into GPU memory, path host", "kernel:read_to_gpu", gpu=True),
        step("p2pdma", "into and out of controller memory", "p2p:controller_memory"),
        step("p2pdma to GPU", "into GPU memory", "p2p:gpu_memory", gpu=True),
    ]


def _with_files() -> list[Step]:
    """Return the steps that need a file system."""

    def step(name: str, what: str, function: str, *, gpu: bool = True, **options: str) -> Step:
        return Step(
            name, what, f"{_STEPS}files:{function}", gpu=gpu, directory=True, options=tuple(options.items()), seconds=90
        )

    steps = [
        step("files", "a file, path host", "host", gpu=False, device="cpu"),
        step("files to GPU", "a file and GPU memory, path host", "host", device="gpu"),
        step("files p2pdma", "a file into GPU memory, path p2pdma", "by_path", path="p2pdma"),
    ]
    return steps + [
        step(f"files {name}", f"a file into GPU memory, path {name}", "by_path", path=name) for name in _CUFILE
    ]


def _with_ours(called: str, driver: str) -> list[Step]:
    """Return the steps in which a driver of ours has the drive, by VFIO or by the kernel module."""

    def step(name: str, what: str, function: str, *, gpu: bool = False, seconds: float = 60, **options: str) -> Step:
        return Step(
            f"{called} {name}", what, _STEPS + function, driver, seconds, gpu=gpu, options=tuple(options.items())
        )

    steps = [
        step("identify", "controller brought up, identified, its health", "driver:identify"),
        step("patterns", "what was on it read; patterns written, read, compared", "driver:patterns"),
        step("queues", "random blocks over queues of several shapes", "driver:queues"),
        step("sizes", "one block to many times MDTS, memory of any alignment", "driver:sizes"),
        step("interrupts", "each vector arrives", "interrupts:vectors"),
        step("abort", "commands aborted while they are under way", "recovery:abort"),
        step("reset", "controller reset under load, then the function", "recovery:reset", seconds=120),
        step("killed", "the process that writes is killed", "recovery:killed", seconds=120),
        step("speed", "once, shortly, beside the kernel's", "speed:speed"),
        step("to GPU", "into GPU memory, by the host's queues", "gpu:read_namespace", gpu=True),
    ]
    for placement, what in _TIERS.items():
        steps.append(step(f"GPU queues {placement}", what, "gpu:queues", gpu=True, seconds=180, placement=placement))
    left, what = f"{_STEPS}kernel:read_what_was_left", "what it wrote, read by the kernel"
    return [
        *steps,
        Step(f"{called} read back", "what it wrote, read by the kernel", left, KERNEL_DRIVER, follows=driver),
    ]


FIRST = Step("machine", "what the doctor sees", f"{_STEPS}machine:examine", seconds=90)
CLEAR = Step("clear", "zeros where it was written", f"{_STEPS}kernel:clear", KERNEL_DRIVER, seconds=120)
PLAN: tuple[Step, ...] = (
    FIRST,
    *_with_kernel(),
    *_with_files(),
    *_with_ours("vfio", VFIO_DRIVER),
    *_with_ours("kmod", OWN_DRIVER),
)
