"""Memory that transfers to a GPU pass through is given back by CUDA before the controller lets go of it.

If this failed, its addresses would be somebody else's memory later, page-locked still: CUDA then refuses to lock that.
"""

from __future__ import annotations

import os

import pytest

import files

KEPT = """
import fake_cuda
from gpunvme import nvme

fake = fake_cuda.use()
fake.set_copy_time(delay_us=500)
with nvme.open("soft:ram?size=1MiB") as controller:
    buffer = fake.alloc(1 << 20)
    kept = controller.namespace().read_into(buffer, 0)
    locked = fake.counters()
    assert locked.live_host_registrations == 1 and locked.page_locked_bytes >= 1 << 20
assert kept.done
freed = fake.counters()
assert freed.live_host_registrations == freed.page_locked_bytes == freed.pending_operations == 0, freed.live()
print(kept.nbytes)
"""


def test_a_transfer_that_is_kept_locks_no_memory_of_a_closed_controller() -> None:
    if not os.environ.get("GPUNVME_FAKE_LIBCUDA"):
        pytest.skip("no libcuda for tests: run `make native-plain`, or name it in GPUNVME_FAKE_LIBCUDA")
    assert files.output(KEPT).strip() == str(1 << 20)
