"""The ``gpu-nvme`` path: bytes of a namespace to and from a GPU's memory, by kernels that drive queues of their own.

Queues are made when a file that was opened with ``path="gpu-nvme"`` first moves something: once for each namespace and
GPU, closed with the last such file. That allocates memory and loads kernels, which CUDA may put off while a kernel of
the caller's runs: who launches kernels that wait for something lets a first transfer end before.

``path="auto"`` never makes queues. It takes those that are there, where they were seen to be faster than ``nvme``.
"""

from __future__ import annotations

from gpunvme import _native
from gpunvme.errors import CudaError, NvmeError, PathError
from gpunvme.memory import Device
from gpunvme.paths.base import OpenMovement, Order, Source, Verdict
from gpunvme.paths.nvme import NamespacesMovement, NamespaceSource, OneNamespace


class GpuNvmePath:
    """Raw namespaces to the memory of a GPU, and back."""

    name = "gpu-nvme"

    def verdict(self, source: Source, device: Device) -> Verdict:
        """Say whether the GPU has queues for the namespace, or could have, and if not why."""
        why_not = self._why_not(source, device)
        if why_not or not isinstance(source, NamespaceSource):
            return Verdict(self.name, False, why_not)
        from gpunvme.gpu.kept import look

        kept = look(source.namespace, device)
        if kept is not None:
            return Verdict(self.name, True, f"{kept.how}; taken where it was seen to be faster than nvme")
        left = source.namespace.controller.queues_left()
        return Verdict(
            self.name,
            True,
            f"kernels on {device} can have {left} more queue{'s' if left != 1 else ''} of "
            f"{source.namespace.controller.transport.uri}; made for path='gpu-nvme', not by 'auto'",
        )

    def _why_not(self, source: Source, device: Device) -> str:
        if not isinstance(source, NamespaceSource):
            return "a file of the kernel's; raw namespaces are opened as nvme+URI"
        if not device.is_gpu:
            return "kernels move bytes to and from the memory of their GPU only"
        missing = _native.cuda_unavailable_reason()
        if missing:
            return missing
        count = len(_native.cuda_devices())
        if device.index >= count:
            return f"there is no {device}: the driver sees {count} GPU(s)"
        from gpunvme.gpu.compile import why_no_kernels
        from gpunvme.gpu.kept import look

        if look(source.namespace, device) is not None:
            return ""
        controller = source.namespace.controller
        try:
            if controller.queues_left() == 0:
                return (
                    f"no I/O queue of {controller.transport.uri} is left for a GPU; open it with fewer of its own, "
                    f"queues={len(controller.io_queues)} now"
                )
        except (NvmeError, ValueError) as error:
            return str(error)
        return why_no_kernels()

    def speed(self, source: Source, device: Device, *, gather: bool = False) -> float | None:
        """Bytes per second of the last large transfer, or gather, by the queues that are there now."""
        if not device.is_gpu or not isinstance(source, NamespaceSource):
            return None
        from gpunvme.gpu.kept import look

        kept = look(source.namespace, device)
        return None if kept is None else kept.speed(gather=gather)

    def begin(self, order: Order) -> OpenMovement:
        """Begin a transfer."""
        return NamespacesMovement(order, self.name, lambda source: self._begin_one(source, order))

    def _begin_one(self, source: NamespaceSource, order: Order) -> OneNamespace:
        from gpunvme.gpu.kept import queues_of
        from gpunvme.gpu.range_movement import RangeMovement

        try:
            kept = queues_of(source, order.device)
        except PathError:
            raise
        except (CudaError, NvmeError) as error:
            raise PathError(f"path {self.name!r} cannot carry this: {error}") from error
        return RangeMovement(kept, order)
