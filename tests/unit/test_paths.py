"""Which path carries what, and what `explain()` says of all of them: the truth, for people who would rather not guess.

Whether there is a GPU or a driver is decided once in a process, so those tests have a process each.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest

import files
import gpunvme
from files import MIB
from gpunvme.memory import Device
from gpunvme.paths import choose as choosing
from gpunvme.paths.base import Verdict

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

NAMES = ["host", "cufile/nvidia-fs", "cufile/p2pdma", "cufile/compat", "p2pdma", "nvme", "gpu-nvme"]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    files.make(tmp_path / "file", 2 * MIB)
    return tmp_path / "file"


@pytest.fixture
def file(place: Path) -> Iterator[gpunvme.File]:
    with gpunvme.open(place) as opened:
        yield opened


def test_every_path_has_its_line(file: gpunvme.File) -> None:
    explanation = file.explain()
    assert [verdict.path for verdict in explanation] == NAMES
    assert len(explanation) == len(NAMES)
    assert all(isinstance(verdict, gpunvme.Verdict) and verdict.reason for verdict in explanation)
    assert [verdict.usable for verdict in explanation] == [True] + [False] * 6
    assert (explanation.chosen, explanation.device) == ("host", "cpu")
    lines = str(explanation).splitlines()
    assert len(lines) == len(NAMES)
    for line, verdict in zip(lines, explanation, strict=True):
        assert line.split()[1 if line.startswith("->") else 0] == verdict.path
        assert verdict.reason in line
    assert [line.startswith("->") for line in lines] == [True] + [False] * 6


def test_what_is_explained_is_what_happens(place: Path, file: gpunvme.File) -> None:
    files.cool(place)
    said = file.explain().verdicts[0].reason
    done = file.read_into(bytearray(2 * MIB)).reason
    for word in ("O_DIRECT", "io_uring", "threads"):
        assert (word in said) == (word in done), (said, done)


def test_the_host_path_by_name(place: Path) -> None:
    with gpunvme.open(place, path="host") as file:
        assert file.read_into(bytearray(100)).path == "host"
        assert file.explain().chosen == "host"


@pytest.mark.parametrize("name", NAMES[1:])
def test_a_path_that_cannot_carry_it(place: Path, name: str) -> None:
    """Whoever names a path wants that one or an error, not another one silently."""
    with pytest.raises(gpunvme.PathError, match=f"path '{name}' cannot carry this: .+"):
        gpunvme.open(place, path=name).read_into(bytearray(10))


@pytest.mark.parametrize("name", ["", "gds", "HOST", "cufile"])
def test_a_path_that_does_not_exist(place: Path, name: str) -> None:
    with pytest.raises(gpunvme.PathError, match="there is no path") as caught:
        gpunvme.open(place, path=name)
    assert "'auto', 'host'" in str(caught.value)


def test_the_faster_path_is_chosen(file: gpunvme.File, monkeypatch: pytest.MonkeyPatch) -> None:
    class Other:
        name = "other"
        usable = True
        seen: float | None = None

        def verdict(self, file: Any, device: Device) -> Verdict:
            return Verdict(self.name, self.usable, "a test's")

        def speed(self, file: Any, device: Device, *, gather: bool = False) -> float | None:
            return self.seen

    other = Other()
    monkeypatch.setattr(choosing, "PATHS", (choosing.HOST, other))
    monkeypatch.setattr(type(choosing.HOST), "speed", lambda *_, gather: 5e9)
    cpu = Device("cpu", 0)
    assert choosing.choose(file._file, cpu) is choosing.HOST
    other.seen = 6e9
    assert choosing.choose(file._file, cpu) is other
    other.usable = False
    assert choosing.choose(file._file, cpu) is choosing.HOST


NO_GPU = """
import sys
import gpunvme
with gpunvme.open(sys.argv[1]) as file:
    explanation = file.explain("cuda:1")
    assert explanation.chosen is None and not any(verdict.usable for verdict in explanation)
    print(explanation.verdicts[0].reason)
    for use in (
        lambda: file.read(0, 10, "cuda"),
        lambda: file.read_into(gpunvme.Span(4096, 100, "cuda:0")),
        lambda: file.read_into(gpunvme.Span(4096, 100, "cuda:0"), wait=False),
        lambda: file.gather([0], 10, out=gpunvme.Span(4096, 100, "cuda:0")),
        lambda: file.gather([0], 10, device="cuda"),
        lambda: gpunvme.read_many([(file, 0, gpunvme.Span(4096, 100, "cuda:0"))]),
        lambda: gpunvme.Buffer.empty(10, "cuda:0"),
    ):
        try:
            use()
        except gpunvme.CudaError as error:
            assert explanation.verdicts[0].reason in str(error), error
        else:
            raise SystemExit("read")
    assert file.read(0, 10).nbytes == 10
    try:
        gpunvme.open(sys.argv[1], path="host").read_into(gpunvme.Span(4096, 100, "cuda:0"))
    except gpunvme.PathError as error:
        assert explanation.verdicts[0].reason in str(error), error
"""


def test_a_machine_without_a_driver(place: Path) -> None:
    said = files.output(NO_GPU, place, env={"GPUNVME_LIBCUDA": "/nowhere/libcuda.so.1"})
    assert said.startswith("no CUDA driver: /nowhere/libcuda.so.1")


def test_a_driver_that_is_too_old(place: Path) -> None:
    said = files.output(NO_GPU, place, env={"GPUNVME_LIBCUDA": "libc.so.6"})
    assert said.startswith("the CUDA driver is too old: it has no cu")


NO_DEVICE = """
import fake_cuda
fake_cuda.use().set_device_count(0)
"""


def test_a_driver_without_a_gpu(place: Path) -> None:
    if not os.environ.get("GPUNVME_FAKE_LIBCUDA"):
        pytest.skip("no libcuda for tests")
    assert "CUDA_ERROR_NO_DEVICE" in files.output(NO_DEVICE + NO_GPU, place)
