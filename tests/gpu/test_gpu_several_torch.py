"""Two real GPUs and PyTorch: which one is meant, whose stream is waited for, where tensors come back to.

If this failed, weights would land on the wrong GPU, or kernels there would compute with what is not there yet.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import files
import gpunvme
from files import MIB
from gpunvme import _native, nvme

pytestmark = [pytest.mark.gpu, pytest.mark.torch]
torch = pytest.importorskip("torch")
ours = pytest.importorskip("gpunvme.torch")

SIZE = 24 * MIB + 1234
GPUS = ("cuda:0", "cuda:1")


@pytest.fixture(scope="module", autouse=True)
def _torch_sees_two_gpus() -> None:
    if torch.cuda.device_count() < len(GPUS):
        pytest.skip(f"needs two GPUs; torch sees {torch.cuda.device_count()}")


@pytest.fixture(autouse=True)
def _the_first_is_current() -> Iterator[None]:
    """And stays it, whatever is moved where."""
    torch.cuda.set_device(0)
    yield
    assert torch.cuda.current_device() == 0


@pytest.fixture
def file(place: Path, data: bytes) -> Iterator[gpunvme.File]:
    with gpunvme.open(place) as opened:
        yield opened


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    generator = torch.Generator().manual_seed(3)
    wanted = {
        f"model.layers.{number}.{name}.weight": torch.randn(700 + number, 512, generator=generator)
        for number in range(6)
        for name in ("up", "down")
    }
    path = tmp_path_factory.mktemp("several") / "model.safetensors"
    gpunvme.save_file(wanted, path)
    return path, wanted


def check(found: dict[str, Any], wanted: dict[str, Any], device: str) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        assert tensor.device == torch.device(device), name
        assert torch.equal(tensor.cpu(), wanted[name]), name


def busy(device: str, milliseconds: float = 50) -> None:
    """A kernel on a GPU's current stream that takes about so long, at 2 GHz or less."""
    with torch.cuda.device(device):
        torch.cuda._sleep(int(milliseconds * 2_000_000))


def test_the_gpu_that_is_named(model: tuple[Path, dict[str, Any]]) -> None:
    path, wanted = model
    for device in ("cuda:1", 1, torch.device("cuda", 1)):
        check(gpunvme.load_file(path, device=device), wanted, "cuda:1")
    check(gpunvme.load_file(path, device="cuda:1", dtype=torch.float32), wanted, "cuda:1")
    with gpunvme.safe_open(path, framework="pt", device="cuda:1") as opened:
        check({name: opened.get_tensor(name) for name in opened.keys()}, wanted, "cuda:1")  # noqa: SIM118


def test_the_current_gpu_is_meant_where_none_is_named(
    model: tuple[Path, dict[str, Any]], file: gpunvme.File, data: bytes
) -> None:
    path, wanted = model
    try:
        torch.cuda.set_device(1)
        check(gpunvme.load_file(path, device="cuda"), wanted, "cuda:1")
        buffer = file.read(0, SIZE, "cuda")
        assert buffer.device == "cuda:1"
        assert buffer.numpy().tobytes() == data[:SIZE]
        assert file.explain("cuda").device == "cuda:1"
        with gpunvme.LayerLoader(path, "cuda") as loader:
            for layer in loader:
                assert {tensor.device.index for tensor in layer.tensors.values()} == {1}
    finally:
        torch.cuda.set_device(0)
    with torch.cuda.device(1):
        check(gpunvme.load_file(path, device="cuda"), wanted, "cuda:1")
    check(gpunvme.load_file(path, device="cuda"), wanted, "cuda:0")


def test_both_at_once_from_threads(model: tuple[Path, dict[str, Any]]) -> None:
    path, wanted = model
    wrong: list[BaseException] = []

    def load(device: str) -> None:
        try:
            for _ in range(3):
                check(gpunvme.load_file(path, device=device), wanted, device)
        except BaseException as error:  # noqa: BLE001 - told to whoever waits
            wrong.append(error)

    threads = [threading.Thread(target=load, args=(device,), daemon=True) for device in GPUS * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a thread hangs"
    assert wrong == []


@pytest.mark.parametrize("nbytes", [100, 8 * MIB])
@pytest.mark.parametrize("wait", [True, False])
def test_a_read_waits_for_the_stream_of_its_own_gpu(data: bytes, file: gpunvme.File, nbytes: int, wait: bool) -> None:
    """A kernel that still writes the destination must not have the last word, whichever GPU is current."""
    side = torch.cuda.Stream("cuda:1")
    tensor = torch.empty(nbytes, dtype=torch.uint8, device="cuda:1")
    torch.cuda.synchronize(1)
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)
        tensor.fill_(7)
    file.read_into(tensor, 5, stream=side, wait=wait).wait()
    assert bytes(tensor.cpu().numpy()) == data[5 : 5 + nbytes]
    busy("cuda:1")
    tensor.fill_(7)  # the current stream of cuda:1, while cuda:0 is current
    file.read_into(tensor, 5, wait=wait).wait()
    assert bytes(tensor.cpu().numpy()) == data[5 : 5 + nbytes]
    with pytest.raises(gpunvme.SpanError, match="the stream is on cuda:0, the memory on cuda:1"):
        file.read_into(tensor, 5, stream=torch.cuda.Stream("cuda:0"))


def test_what_is_written_is_what_the_gpus_streams_have_made(tmp_path: Path) -> None:
    tensor = torch.zeros(4 * MIB, dtype=torch.uint8, device="cuda:1")
    busy("cuda:1")
    tensor.add_(3)
    with gpunvme.open(tmp_path / "new", "w") as target:
        target.write_from(tensor)
    assert (tmp_path / "new").read_bytes() == bytes([3]) * (4 * MIB)


def test_state_dicts_come_back_to_their_gpu(tmp_path: Path) -> None:
    one, two = (torch.randn(500, 1000, device=device) for device in GPUS)
    saved = {"one": one, "two": two, "view": two[3:7].t(), "cpu": torch.arange(10)}
    busy("cuda:1")
    two.add_(1)
    ours.save(saved, tmp_path / "ours", crc32=True)
    torch.save(saved, tmp_path / "theirs")
    for found in (ours.load(tmp_path / "ours"), ours.load(tmp_path / "theirs"), torch.load(tmp_path / "ours")):
        for name, tensor in saved.items():
            assert found[name].device == tensor.device, name
            assert torch.equal(found[name], tensor), name
    moved = ours.load(tmp_path / "ours", {"cuda:1": "cuda:0"})
    assert {tensor.device.type + str(tensor.device.index) for tensor in moved.values()} == {"cuda0", "cpuNone"}
    assert torch.equal(moved["two"].cpu(), two.cpu())
    assert ours.load(tmp_path / "ours", "cuda:1")["one"].device.index == 1


def test_layers_computed_on_the_second_gpu(model: tuple[Path, dict[str, Any]]) -> None:
    path, wanted = model
    budget = {"budget_gpu": 9 * MIB, "budget_host": 6 * MIB}
    with gpunvme.LayerLoader(path, "cuda:1", **budget) as loader:
        sums = []
        for _ in range(3):
            for layer in loader:
                busy("cuda:1", 5)  # the host is ahead of the GPU
                sums += [(name, tensor.double().sum()) for name, tensor in layer.tensors.items()]
    for name, found in sums:
        assert found.device.index == 1
        torch.testing.assert_close(found.cpu(), wanted[name].double().sum())


def test_tables_and_queues_with_tensors(tmp_path: Path) -> None:
    table = torch.randn(2000, 128)
    (tmp_path / "table").write_bytes(table.numpy().tobytes())
    features = ours.FeatureTable(tmp_path / "table", 128, device="cuda:1")
    order = torch.randperm(2000)
    found = features.gather(order)
    assert found.device.index == 1
    assert torch.equal(found.cpu(), table[order])
    with nvme.open("soft:ram?size=8MiB&queues=8&threads=2", queues=2) as controller:
        namespace = controller.namespace()
        namespace.write_from(table.numpy())
        queues = namespace.gpu_queues(torch.device("cuda", 1), count=2)
        out = torch.empty_like(found)
        busy("cuda:1")
        lbas = order.to("cuda:1")  # a row is a block; made on the stream that the kernel is launched on
        queues.gather(lbas, out)
        assert torch.equal(out, found)
        with pytest.raises(gpunvme.SpanError, match="memory is on cuda:0; these queues are driven by cuda:1"):
            queues.gather(lbas, torch.empty_like(found, device="cuda:0"))
        namespace.read_into(out.zero_())
        assert torch.equal(out.cpu(), table)


@pytest.mark.parametrize("path", ["cufile/compat", "cufile/nvidia-fs", "cufile/p2pdma"])
def test_by_cufile(data: bytes, place: Path, path: str) -> None:
    with gpunvme.open(place, path=path) as opened:
        verdict = {verdict.path: verdict for verdict in opened.explain("cuda:1").verdicts}[path]
        if not verdict.usable:
            pytest.skip(verdict.reason)
        tensors = [torch.zeros(SIZE, dtype=torch.uint8, device=device) for device in GPUS]
        try:
            for _ in range(3):  # registered from the second time on
                for transfer in [opened.read_into(tensor, wait=False) for tensor in tensors]:
                    transfer.wait(60)
        except gpunvme.PathError as error:
            pytest.skip(str(error))
        for tensor in tensors:
            assert bytes(tensor.cpu().numpy()) == data[:SIZE]


VISIBLE = """
import sys
import gpunvme
from gpunvme import _native
(device,) = _native.cuda_devices()
with gpunvme.open(sys.argv[1]) as file, open(sys.argv[1], "rb") as opened:
    assert file.read(0, 100_000, "cuda").numpy().tobytes() == opened.read(100_000)
    try:
        file.read(0, 100, "cuda:1")
    except gpunvme.CudaError as error:
        assert "cuda:1" in str(error), error
    else:
        raise AssertionError("there is no cuda:1")
print(device["pci_bus_id"])
"""


def test_the_gpu_that_cuda_shows_is_known_by_its_own_pci_address(place: Path, data: bytes) -> None:
    """Doctor, pairs and links go by PCI address; ``CUDA_VISIBLE_DEVICES`` changes only what cuda:0 is."""
    addresses = [device["pci_bus_id"] for device in _native.cuda_devices()]
    shown = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    second = shown[1] if len(shown) > 1 else "1"
    said = files.output(VISIBLE, place, env={"CUDA_VISIBLE_DEVICES": second}, timeout=120)
    assert said == addresses[1] + "\n"
