"""GPUDirect Storage on a real GPU: cuFile in compatibility mode, which every machine has that has cuFile at all.

Where nvidia-fs or P2PDMA carry the bytes, the tests of compatibility mode are skipped: what cuFile does is for it to
decide, and the tests of reports still hold.

Where udev's database does not have the file system, as in most containers, cuFile 1.15 takes no file on it: then that
is what is tested, and all else is skipped. As root, with GPUNVME_TEST_UDEV=1, the entry is made for as long as the
tests run.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import files
import gpunvme
from files import MIB
from gpunvme.cufile import facts

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.gpu, pytest.mark.torch]
torch = pytest.importorskip("torch")

SIZE = 40 * MIB + 1234
COMPAT = "cufile/compat"


def missing_from_udev(place: Path) -> str:
    with place.open("rb") as opened:
        return facts.missing_from_udev(facts.place_of(opened.fileno()))


@pytest.fixture(scope="module")
def _udev_entry(place: Path, data: bytes) -> Iterator[None]:
    """What udev would have written, where we are told to write it."""
    if not missing_from_udev(place) or os.environ.get("GPUNVME_TEST_UDEV") != "1" or os.geteuid():
        yield
        return
    with place.open("rb") as opened:
        where = facts.place_of(opened.fileno())
    entry = Path("/run/udev/data") / f"b{where.device}"
    if entry.exists():
        pytest.skip(f"{entry} is there, without ID_FS_USAGE: left as it is")
    made = [folder for folder in (entry.parent, entry.parent.parent) if not folder.exists()]
    entry.parent.mkdir(parents=True, exist_ok=True)
    entry.write_text(f"I:1\nE:ID_FS_TYPE={where.kind}\nE:ID_FS_USAGE=filesystem\n")
    try:
        yield
    finally:
        entry.unlink()
        for folder in made:
            folder.rmdir()


@pytest.fixture(scope="module", autouse=True)
def _cufile_in_compatibility_mode(_udev_entry: None, data: bytes, place: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch has no CUDA")
    from gpunvme.cufile import library

    if reason := library.why_absent():
        pytest.skip(reason)
    with gpunvme.open(place) as opened:
        verdict = {verdict.path: verdict for verdict in opened.explain("cuda")}[COMPAT]
        if not verdict.usable and "udev's database" not in verdict.reason:
            pytest.skip(f"no compatibility mode here: {verdict.reason}")


@pytest.fixture(scope="module")
def refusal(_cufile_in_compatibility_mode: None, place: Path) -> str:
    """Why cuFile takes no file here; "" where it does."""
    try:
        with gpunvme.open(place, path=COMPAT) as opened:
            opened.read_into(on_gpu(4096))
    except gpunvme.PathError as error:
        return str(error)
    return ""


@pytest.fixture(autouse=True)
def _taken(request: pytest.FixtureRequest, refusal: str) -> None:
    if refusal and request.function is not test_a_refusal_says_why:
        pytest.skip(refusal)


def test_a_refusal_says_why(refusal: str, place: Path) -> None:
    """Whoever runs in a container is told what to mount into it."""
    if not refusal:
        pytest.skip("cuFile takes files on this file system")
    assert missing_from_udev(place), refusal
    assert "-v /run/udev:/run/udev:ro" in refusal
    with gpunvme.open(place) as opened:
        tensor = on_gpu(4096)
        assert opened.read_into(tensor).path == "host"


@pytest.fixture
def file(place: Path, data: bytes) -> Iterator[gpunvme.File]:
    with gpunvme.open(place, path=COMPAT) as opened:
        yield opened


def raw(tensor: Any) -> bytes:
    return bytes(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def on_gpu(nbytes: int) -> Any:
    return torch.full((nbytes,), 0xA5, dtype=torch.uint8, device="cuda:0")


@pytest.mark.parametrize(
    ("offset", "nbytes"),
    [(0, SIZE), (0, 0), (1, 1), (511, 513), (4096, 65536), (7, 65537), (4095, 20 * MIB + 2), (5, SIZE - 9)],
)
@pytest.mark.parametrize("wait", [True, False])
def test_the_bytes_arrive_and_nothing_else_is_written(
    data: bytes, file: gpunvme.File, offset: int, nbytes: int, wait: bool
) -> None:
    room = on_gpu(nbytes + 8192)
    torch.cuda.synchronize()
    transfer = file.read_into(room[4096 : 4096 + nbytes], offset, wait=wait).wait(60)
    print(transfer)
    guard = bytes([0xA5]) * 4096
    assert raw(room) == guard + data[offset : offset + nbytes] + guard
    assert transfer.path == COMPAT
    assert transfer.nbytes == nbytes == transfer.direct_bytes + transfer.buffered_bytes


def test_the_evidence(file: gpunvme.File) -> None:
    """cuFile's own counters show which way it was, and the report says what they showed."""
    tensor = on_gpu(16 * MIB)
    transfer = file.read_into(tensor)
    print(transfer)
    assert transfer.path == COMPAT
    assert "through host memory, as cuFile counted" in transfer.reason
    assert transfer.bounced_bytes == transfer.nbytes


@pytest.mark.parametrize("nbytes", [4096, 5000])
def test_gathering(data: bytes, file: gpunvme.File, nbytes: int) -> None:
    """By threads: cuFileBatchIOSubmit of 1.15 does not return in compatibility mode."""
    offsets = np.random.default_rng(1).integers(0, (SIZE - nbytes) // 4096, 1000) * 4096
    out = on_gpu(1000 * nbytes)
    file.gather(offsets, nbytes, out=out)
    print(file.last_transfer)
    assert raw(out) == b"".join(data[at : at + nbytes] for at in offsets)
    assert file.last_transfer is not None
    assert file.last_transfer.path == COMPAT
    assert "by threads" in file.last_transfer.reason
    assert "not in batches" in file.last_transfer.reason


def test_a_read_that_nobody_waits_for(data: bytes, file: gpunvme.File) -> None:
    """It begins behind what the stream has to do, by threads."""
    side = torch.cuda.Stream()
    tensor = on_gpu(8 * MIB)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)
        tensor.fill_(7)
        job = file.read_into(tensor, 8192, wait=False)
    job.wait(60)
    print(job)
    assert raw(tensor) == data[8192 : 8192 + 8 * MIB]
    assert "not in stream order" in job.reason


def test_parts_of_registered_memory(data: bytes, file: gpunvme.File) -> None:
    """They are named by the base of the registration, all else by its own address."""
    buffer = gpunvme.Buffer.empty(40 * MIB, "cuda:0")
    tensor = torch.as_tensor(buffer, device="cuda")
    for use in range(3):
        file.read_into(buffer, use)
    for wait in (True, False):
        file.read_into(tensor[MIB : 21 * MIB], 4096, wait=wait).wait(60)
        assert raw(tensor[MIB : 21 * MIB]) == data[4096 : 4096 + 20 * MIB]


def test_a_read_waits_for_the_current_stream(data: bytes, file: gpunvme.File) -> None:
    tensor = on_gpu(8 * MIB)
    torch.cuda.synchronize()
    torch.cuda._sleep(100_000_000)
    tensor.fill_(7)
    file.read_into(tensor, 5)
    assert raw(tensor) == data[5 : 5 + 8 * MIB]


@pytest.mark.parametrize(("offset", "nbytes"), [(0, 20 * MIB), (8192, 65536), (100, 3 * MIB + 5), (4000, 16384)])
@pytest.mark.parametrize("wait", [True, False])
def test_writing(tmp_path: Path, offset: int, nbytes: int, wait: bool) -> None:
    old, new = files.make(tmp_path / "file", 2 * MIB), files.contents(nbytes, seed=2)
    tensor = torch.frombuffer(bytearray(new), dtype=torch.uint8).cuda()
    with gpunvme.open(tmp_path / "file", "r+", path=COMPAT) as opened:
        transfer = opened.write_from(tensor, offset, fsync=True, wait=wait).wait(60)
    print(transfer)
    expected = bytearray(old)
    expected.extend(bytes(max(0, offset + nbytes - len(old))))
    expected[offset : offset + nbytes] = new
    assert (tmp_path / "file").read_bytes() == expected
    assert transfer.path == COMPAT


def test_memory_is_registered_once_and_for_as_long_as_it_lives(data: bytes, file: gpunvme.File) -> None:
    """cudaMalloc gives the same address again: the registration of what was there must not be used."""
    from gpunvme.cufile import buffers
    from gpunvme.cufile.cuda import Context

    buffer = gpunvme.Buffer.empty(8 * MIB, "cuda:0")
    address, number = buffer.ptr, Context.buffer_id(buffer.ptr)
    assert number is not None
    for use in range(3):
        transfer = file.read_into(buffer, use)
        assert "not registered" not in transfer.reason, transfer.reason
    assert address in buffers.REGISTRATIONS._registered
    del buffer, transfer
    gc.collect()
    again = gpunvme.Buffer.empty(8 * MIB, "cuda:0")
    if again.ptr != address:
        pytest.skip("the driver gave another address")
    assert Context.buffer_id(again.ptr) != number
    file.read_into(again, 9)
    assert raw(torch.as_tensor(again, device="cuda")) == data[9 : 9 + 8 * MIB]
    assert address not in buffers.REGISTRATIONS._registered


def test_many_transfers_at_once(data: bytes, file: gpunvme.File) -> None:
    tensors = [on_gpu(3 * MIB) for _ in range(8)]
    torch.cuda.synchronize()
    jobs = [file.read_into(tensor, i * 4096, wait=False) for i, tensor in enumerate(tensors)]
    for i, (job, tensor) in enumerate(zip(jobs, tensors, strict=True)):
        assert job.wait(60).path == COMPAT
        assert raw(tensor) == data[i * 4096 : i * 4096 + 3 * MIB]


def test_errors(file: gpunvme.File, tmp_path: Path) -> None:
    with pytest.raises(gpunvme.PathError, match="for GPU memory"):
        file.read_into(bytearray(10))
    files.make(tmp_path / "file", 4 * MIB)
    with gpunvme.open(tmp_path / "file", path=COMPAT) as opened:
        tensor = on_gpu(4 * MIB)
        opened.read_into(tensor)
        job = opened.read_into(tensor, wait=False)
        job.cancel()
        try:
            job.wait(60)
        except gpunvme.Cancelled:
            pass
        assert job.done
    read_only = os.open(tmp_path / "file", os.O_RDONLY)
    try:
        with gpunvme.open(read_only, path=COMPAT) as opened, pytest.raises(gpunvme.FileError):
            opened.write_from(tensor)
    finally:
        os.close(read_only)


def test_a_checkpoint(tmp_path: Path) -> None:
    weights = {f"layer.{i}": torch.randn(257, 333, device="cuda") for i in range(20)}
    gpunvme.save_file(weights, tmp_path / "model.safetensors")
    seen: list[gpunvme.Transfer] = []
    loaded = gpunvme.load_file(tmp_path / "model.safetensors", "cuda:0", path=COMPAT, report=seen.append)
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)
    assert {transfer.path for transfer in seen} == {COMPAT}


def test_measured_against_the_host_path(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The figures are shown, kept, and decide: compatibility mode is never chosen where our own path was faster."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with gpunvme.open(place) as opened:
        explanation = opened.explain("cuda:0", measure=True)
        print(explanation)
        assert explanation.measured is not None
        assert "cufile/compat" in explanation.measured
    from gpunvme.paths import measure, measured

    with gpunvme.open(place) as opened:
        key = measure.key(opened._file, gpunvme.Device("cuda", 0))  # type: ignore[arg-type]
        record = measured.find(key)
        assert record is not None
        files.warm(place)
        tensor = on_gpu(SIZE)
        expected = COMPAT if record.faster(COMPAT, "host", SIZE, 0) else "host"
        assert opened.read_into(tensor).path == expected


def test_no_log_file_in_the_working_directory(place: Path, tmp_path: Path) -> None:
    program = (
        "import sys, torch, gpunvme\n"
        "t = torch.empty(1 << 20, dtype=torch.uint8, device='cuda')\n"
        "print(gpunvme.open(sys.argv[1], path='cufile/compat').read_into(t))\n"
    )
    child = subprocess.run(
        [sys.executable, "-c", program, str(place)],
        cwd=tmp_path,
        env=files.environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    assert os.listdir(tmp_path) == []
