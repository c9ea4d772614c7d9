"""NVMe queues that GPU kernels drive: made by `Namespace.gpu_queues`, for kernels of the package's and of yours.

Needs an NVIDIA driver; `compile` also needs NVRTC and libcu++ (a CUDA toolkit, or ``pip install gpunvme[cuda]``).
"""

from __future__ import annotations

from gpunvme.gpu.cache import CachedArray
from gpunvme.gpu.compile import Kernel, Program, compile, compile_to_cubin, include_directory  # noqa: A004
from gpunvme.gpu.queues import GpuQueues

__all__ = ["CachedArray", "GpuQueues", "Kernel", "Program", "compile", "compile_to_cubin", "include_directory"]
