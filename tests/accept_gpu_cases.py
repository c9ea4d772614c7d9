"""The steps of `gpunvme accept` for GPUs, on the emulated one and the software controller.

test_accept_gpu.py runs it in a process of its own.
"""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

import emulated_gpu
from gpunvme import nvme
from gpunvme.accept.job import MIB, Job, compare, contents
from gpunvme.accept.result import Skipped
from gpunvme.accept.steps import files, gpu, machine
from gpunvme.nvme.gpu_memory import GpuAccess
from gpunvme.nvme.soft import SoftTransport

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(autouse=True)
def emulated() -> Iterator[None]:
    cuda = emulated_gpu.use()
    yield
    gc.collect()
    cuda.reset()


@pytest.fixture
def job(tmp_path: Path) -> Job:
    uri = f"soft:{tmp_path / 'image'}?size=32MiB&queues=16&lba=4096"
    return Job("0000:01:00.0", nbytes=32 * MIB, block_size=4096, area=8 * MIB, area_nbytes=MIB, far=24 * MIB, uri=uri)


@pytest.mark.parametrize("placement", ["host", "data", "full"])
def test_kernels_move_everything_in_every_tier(job: Job, placement: str) -> None:
    result = gpu.queues(replace(job, options={"placement": placement}))
    assert "used: what kernels read was compared" in result.seen
    (figure,) = result.figures
    assert figure.value > 0
    with nvme.open(job.uri) as controller:
        everything = controller.namespace().read().numpy()
    compare(everything[8 * MIB : 9 * MIB], contents(result.facts["left"], MIB), "what was left")
    everything[8 * MIB : 9 * MIB] = 0
    assert not everything.any(), "kernels wrote elsewhere"


def test_a_tier_that_the_way_does_not_have_is_left_out(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    # As VFIO says: no failure of this machine's, but nothing to be tried either.
    monkeypatch.setattr(SoftTransport, "gpu_access", GpuAccess("none", "that takes a kernel module"))
    with pytest.raises(Skipped, match="that takes a kernel module"):
        gpu.queues(replace(job, options={"placement": "full"}))
    assert gpu.queues(replace(job, options={"placement": "host"})).seen


def test_a_namespace_is_read_to_the_gpu(job: Job) -> None:
    result = gpu.read_namespace(job)
    assert gpu.read_namespace(replace(job, left=result.facts["left"])).seen
    with pytest.raises(ValueError, match="bytes differ"):
        gpu.read_namespace(replace(job, left=7))


def test_files_go_to_the_gpu_and_back(job: Job, tmp_path: Path) -> None:
    assert files.host(replace(job, directory=str(tmp_path), options={"device": "gpu"})).seen


def test_the_gpu_is_seen(job: Job) -> None:
    facts = machine.examine(job).facts
    assert facts["cuda"] == ""
    assert facts["gpus"]
    assert "there is no cuda:99" in machine.examine(replace(job, device="cuda:99")).facts["cuda"]
