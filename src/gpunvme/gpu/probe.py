"""The placement of GPU queues, found by trying: made from the highest down, until what kernels read is right."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from gpunvme import nvtx_ranges
from gpunvme.errors import CudaError, NvmeError, PathError
from gpunvme.gpu.driver import Gpu
from gpunvme.gpu.moves import Moves
from gpunvme.gpu.placement import candidates, describe, describe_ordering
from gpunvme.gpu.queue_set import QueueSet, QueueShape
from gpunvme.memory import Buffer, Device

if TYPE_CHECKING:
    from gpunvme.nvme.namespace import Namespace

_VERIFIED_BLOCKS = 8


class Probe:
    """Makes GPU queues in the best placement that works.

    Parameters
    ----------
    gpu, namespace
        Who drives them, and for which blocks.
    kernels
        Handles of the package's kernels, by name.
    shape
        What the queues are like.
    doorbell
        As for `GpuDoorbells`.

    Attributes
    ----------
    reasons
        For each placement that was thought of, why it is used or not.
    """

    def __init__(
        self, gpu: Gpu, namespace: Namespace, kernels: dict[str, int], shape: QueueShape, doorbell: str
    ) -> None:
        self._gpu = gpu
        self._namespace = namespace
        self._controller = namespace.controller
        self._kernels = kernels
        self._shape = shape
        self._doorbell = doorbell
        self.reasons: dict[str, str] = {}

    def make(self, wanted: str, take_ids: Callable[[], list[int]]) -> tuple[QueueSet, Moves]:
        """Make them.

        Parameters
        ----------
        wanted
            ``"auto"``, or a placement that must be had.
        take_ids
            Takes queue ids from the controller. A placement that does not work gives its ids, and all else, back.

        Raises
        ------
        PathError
            If a placement in GPU memory was asked for and cannot be used.
        NvmeError, CudaError
            If the placement in host memory does not work either.
        DeadlineExceeded
            If a kernel does not end. Nothing else can be tried then: whatever allocates would wait for it.
        """
        names, self.reasons = candidates(self._controller, self._gpu, wanted)
        for name in names:
            ids = take_ids()
            try:
                where = f"{self._namespace.name} for cuda:{self._gpu.index}, placement {name}"
                with nvtx_ranges.during(f"{len(ids)} GPU queues made on {where}"):
                    made = self._try(name, ids)
            except (NvmeError, CudaError, PathError) as error:
                if name == "host":
                    raise
                self.reasons[name] = f"it was tried, and failed: {error}"
                if wanted != "auto":
                    uri = self._controller.transport.uri
                    raise PathError(f"placement {name!r} cannot be used on {uri}: {self.reasons[name]}") from error
            else:
                self.reasons[name] = "used: what kernels read was compared with what the driver reads"
                if name != "host":
                    where = describe(name, self._controller)
                    self.reasons[name] += f"; {where}; {describe_ordering(self._gpu)}"
                for lower in names[names.index(name) + 1 :]:
                    self.reasons[lower] = f"not needed: {name!r} works"
                return made
        raise AssertionError("the last candidate is used, or raises")

    def _try(self, placement: str, queue_ids: list[int]) -> tuple[QueueSet, Moves]:
        try:
            queues = QueueSet(
                self._gpu,
                self._namespace,
                self._kernels,
                queue_ids,
                self._shape,
                placement=placement,
                doorbell=self._doorbell,
            )
            try:
                moves = Moves(self._gpu, self._namespace, queues, len(queue_ids), self._kernels)
                self._controller.admit(queues)
            except BaseException:
                queues.free()
                raise
        except BaseException:
            self._controller.give_queue_ids(queue_ids)
            raise
        queues.watch()
        try:
            self._verify(queues, moves)
        except BaseException:
            queues.close()
            raise
        return queues, moves

    def _verify(self, queues: QueueSet, moves: Moves) -> None:
        """Read the first blocks by kernel and by the driver's own queues: both must bring the same."""
        namespace = self._namespace
        blocks = min(_VERIFIED_BLOCKS, namespace.blocks)
        if blocks == 0:
            return
        expected = namespace.read(0, blocks).numpy().tobytes()
        buffer = Buffer.empty(len(expected), Device("cuda", self._gpu.index))
        for kernel in ("gather", "stream"):
            if kernel == "gather":
                moves.rows("gather", np.arange(blocks), buffer, None, queues.stream, True, None)
            else:
                moves.stream(0, buffer.nbytes, buffer, queues.stream, True, None)
            if buffer.numpy().tobytes() != expected:
                raise NvmeError(
                    f"{namespace.name}: placement {queues.placement!r} read other bytes than the driver's own queues "
                    "do; this GPU and this controller cannot share memory"
                )
