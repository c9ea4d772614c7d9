"""Memory that was page-locked for a GPU and is gone. If this failed, CUDA would copy into pages that nobody sees."""

from __future__ import annotations

import numpy as np
import pytest

from gpunvme import nvme
from gpunvme.memory import Buffer

pytestmark = pytest.mark.gpu

SIZE = 1 << 20


def test_addresses_of_a_closed_controllers_memory_can_be_used_again() -> None:
    data = np.random.default_rng(1).integers(0, 256, SIZE, np.uint8)
    target = Buffer.empty(SIZE, "cuda:0")
    for _ in range(8):
        with nvme.open(f"soft:ram?size={SIZE}", queues=1) as controller:
            namespace = controller.namespace()
            namespace.write_from(data)
            namespace.read_into(target)
            with namespace.gpu_queues(0, count=1) as queues:
                queues.stream(0, SIZE, target)
        # The copies' destinations come to lie where the controller's memory was.
        copies = [target.numpy() for _ in range(48)]
        assert all(np.array_equal(copy, data) for copy in copies)
