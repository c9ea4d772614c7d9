"""A model layer by layer, in host memory: always what the fully loaded model has, whatever is asked for and when."""

from __future__ import annotations

import gc
import itertools
import os
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import files
import gpunvme
from gpunvme.errors import BudgetError, LayerError
from gpunvme.models import layer_ring

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

relaxed = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
LAYERS = 6


def model(layers: int = LAYERS, rows: int = 300, seed: int = 1) -> dict[str, np.ndarray[Any, Any]]:
    """Embedding, layers of unequal sizes and types, norm, head."""
    rng = np.random.default_rng(seed)
    found = {"model.embed_tokens.weight": rng.random((rows, 7), np.float32)}
    for number in range(layers):
        prefix = f"model.layers.{number}."
        found[prefix + "attn.weight"] = rng.random((rows, 64), np.float32)
        found[prefix + "mlp.weight"] = rng.integers(-9, 9, (rows * (1 + number % 2), 33)).astype(np.int8)
        found[prefix + "norm.scale"] = rng.random((), np.float64)
        found[prefix + "empty"] = np.empty((0, 3), np.float16)
    found["model.norm.weight"] = rng.random(64, np.float32)
    found["lm_head.weight"] = rng.random((rows, 9), np.float32)
    return found


@pytest.fixture(scope="module")
def whole() -> dict[str, np.ndarray[Any, Any]]:
    return model()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, whole: dict[str, Any]) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    gpunvme.save_file(whole, path)
    return path


@pytest.fixture
def loader(checkpoint: Path) -> Iterator[gpunvme.LayerLoader]:
    with gpunvme.LayerLoader(checkpoint, framework="np") as opened:
        yield opened


def check(layer: Any, whole: dict[str, Any]) -> None:
    """Every tensor of a layer is what the whole model has, usable and aligned as its type wants it."""
    for name, tensor in layer.tensors.items():
        assert (tensor.dtype, tensor.shape) == (whole[name].dtype, whole[name].shape)
        assert tensor.tobytes() == whole[name].tobytes(), name
        assert tensor.flags.aligned
    assert layer.nbytes == sum(whole[name].nbytes for name in layer.tensors)


def go_on(loader: gpunvme.LayerLoader, whole: dict[str, Any], order: list[int]) -> None:
    """A pass; ``order`` gets the layers that came."""
    for layer in loader:
        check(layer, whole)
        order.append(layer.index)


def test_a_pass(loader: gpunvme.LayerLoader, whole: dict[str, Any]) -> None:
    seen: list[str] = []
    for number, layer in enumerate(loader):
        assert (layer.index, layer.name) == (number, loader.names[number])
        check(layer, whole)
        seen += layer.tensors
    assert sorted(seen) == sorted(whole)
    assert loader.names == ["front", *(f"model.layers.{number}" for number in range(LAYERS)), "back"]
    assert loader.nbytes == sum(array.nbytes for array in whole.values())
    assert (len(loader), loader.stats().layers) == (LAYERS + 2, LAYERS + 2)


def test_token_after_token(loader: gpunvme.LayerLoader, whole: dict[str, Any]) -> None:
    for _ in range(5):
        for layer in loader:
            check(layer, whole)
    stats = loader.stats()
    assert stats.hits == {"source": 5 * len(loader)}
    assert stats.read_bytes >= 5 * loader.nbytes
    assert sum(stats.paths[name]["host"] for name in stats.paths) == stats.read_bytes
    assert "read by host" in str(stats)
    assert all("page cache" in reason or "O_DIRECT" in reason for reason in stats.reasons.values())


orders = st.lists(
    st.one_of(
        st.just("pass"), st.integers(-LAYERS - 2, LAYERS + 1), st.integers(0, LAYERS).map(lambda n: ("part", n + 1))
    ),
    max_size=12,
)


@relaxed
@given(
    order=orders,
    slots=st.integers(1, LAYERS + 3),
    budget=st.none() | st.integers(0, 1_500_000),
    repeat=st.booleans(),
    group=st.sampled_from([None, lambda name: "all", lambda name: len(name) % 3, lambda name: name]),
    heat=st.sampled_from(["cold", "hot"]),
    framework=st.sampled_from(["np", "pt"]),
)
def test_any_order_under_any_budget(
    checkpoint: Path,
    whole: dict[str, Any],
    order: list[Any],
    slots: int,
    budget: int | None,
    repeat: bool,
    group: Any,
    heat: str,
    framework: str,
) -> None:
    if framework == "pt":
        pytest.importorskip("torch")
    files.heat(checkpoint, heat)
    try:
        loader = gpunvme.LayerLoader(
            checkpoint, slots=slots, budget_host=budget, repeat=repeat, group=group, framework=framework
        )
    except BudgetError as error:
        assert budget is not None
        least = int(str(error).rpartition(" take ")[2].split()[0])
        assert least > budget
        gpunvme.LayerLoader(checkpoint, slots=slots, budget_host=least, group=group, framework=framework).close()
        return

    def compare(layer: Any) -> None:
        if framework == "np":
            return check(layer, whole)
        return check(Arrays(layer), whole)

    with loader:
        if budget is not None:
            stay = sum(loader._layers[index].slot_bytes for index in loader._stay)
            biggest = max((loader._layers[index].slot_bytes for index in loader._rest), default=0)
            assert stay + biggest * len(loader._ring.slots) <= budget
        for step in order:
            if step == "pass":
                assert [layer.index for layer in loader if compare(layer) is None] == list(range(len(loader)))
            elif isinstance(step, tuple):
                for layer in loader:
                    compare(layer)
                    if layer.index + 1 >= step[1]:
                        break
            elif -len(loader) <= step < len(loader):
                compare(loader[step])
        stats = loader.stats()
        assert stats.layers == sum(stats.hits.values())


class Arrays:
    """A layer of torch tensors as one of arrays."""

    def __init__(self, layer: Any) -> None:
        self.tensors = {name: tensor.numpy() for name, tensor in layer.tensors.items()}
        self.nbytes = layer.nbytes


def test_layers_that_stay_are_read_once(checkpoint: Path, whole: dict[str, Any]) -> None:
    with gpunvme.LayerLoader(checkpoint, framework="np", budget_host=1 << 30) as loader:
        before = loader.stats().read_bytes
        for _ in range(3):
            for layer in loader:
                check(layer, whole)
                assert layer.tier == "device"
        assert loader.stats().read_bytes == before
        assert "8 stay on cpu, 0 slots" in repr(loader)


def test_a_budget_for_some_is_used_and_spread(checkpoint: Path) -> None:
    """Layers that stay side by side would leave the drive idle while they are computed with."""
    with gpunvme.LayerLoader(checkpoint, framework="np", slots=2) as loader:
        sizes = [layer.slot_bytes for layer in loader._layers]
    budget = 2 * max(sizes) + sum(sizes) // 2
    with gpunvme.LayerLoader(checkpoint, framework="np", slots=2, budget_host=budget) as loader:
        stay = sorted(loader._stay)
        assert sum(sizes[index] for index in stay) > sum(sizes) // 3
        reads = [index for index in range(1, LAYERS + 1) if index not in stay]
        assert 2 <= len(reads) <= 4
        assert max(later - earlier for earlier, later in itertools.pairwise(stay)) <= 3


def test_the_next_layers_are_read_meanwhile(checkpoint: Path) -> None:
    with gpunvme.LayerLoader(checkpoint, framework="np", slots=3) as loader:
        for layer in loader:
            coming = {(layer.index + step) % len(loader) for step in (1, 2)}
            held = {slot.layer for slot in loader._ring.slots}
            assert held == coming | {layer.index}
        first = loader[0]  # it was read during the last pass
        assert first.tier == "source"
        assert loader.stats().read_bytes < 1.3 * loader.nbytes


def test_without_a_next_pass_nothing_more_is_read(checkpoint: Path) -> None:
    with gpunvme.LayerLoader(checkpoint, framework="np", slots=3, repeat=False) as loader:
        for _layer in loader:
            pass
        assert loader.stats().read_bytes <= 1.01 * loader.nbytes + 4096 * len(loader)
        assert not any(slot.in_flight for slot in loader._ring.slots)
        assert {slot.layer for slot in loader._ring.slots} == {5, 6, 7}


def test_by_name_and_number(loader: gpunvme.LayerLoader, whole: dict[str, Any]) -> None:
    check(loader["model.layers.3"], whole)
    check(loader[-1], whole)
    assert loader["back"].index == 7
    assert loader["back"].tier == "device"
    with pytest.raises(KeyError, match=r"no layer 'model.layers.9'; there are: front, "):
        loader["model.layers.9"]
    for wrong in (8, -9):
        with pytest.raises(IndexError, match="there are 8"):
            loader[wrong]
    with pytest.raises(TypeError):
        loader[1.5]  # type: ignore[index]


# --- what is no proper use


def test_a_layer_is_valid_until_the_next_one(loader: gpunvme.LayerLoader) -> None:
    first = loader[0]
    tensors = first.tensors
    assert tensors
    loader[1]
    with pytest.raises(LayerError, match="'front' was given back"):
        first.tensors  # noqa: B018
    last = None
    for last in loader:  # noqa: B007
        pass
    with pytest.raises(LayerError, match="given back"):
        last.tensors  # noqa: B018


def test_given_back_early(loader: gpunvme.LayerLoader) -> None:
    layer = loader[2]
    layer.release()
    layer.release()
    with pytest.raises(LayerError):
        layer.tensors  # noqa: B018
    other = loader[3]
    layer.release()  # does nothing to the one that is held now
    assert other.tensors


def test_two_passes_at_a_time_are_refused(loader: gpunvme.LayerLoader) -> None:
    """Each would overwrite what the other computes with."""
    one, other = iter(loader), iter(loader)
    next(one)
    next(other)
    with pytest.raises(LayerError, match="another pass was begun"):
        next(one)
    with pytest.raises(LayerError, match="another pass was begun"):
        list(zip(loader, loader, strict=True))


def test_a_pass_does_not_go_on_behind_random_access(loader: gpunvme.LayerLoader) -> None:
    one = iter(loader)
    next(one)
    loader[5]
    with pytest.raises(LayerError, match="another pass was begun"):
        next(one)


def test_two_threads_are_refused(loader: gpunvme.LayerLoader, whole: dict[str, Any]) -> None:
    held = loader[1]
    said: list[BaseException] = []

    def other() -> None:
        for use in (lambda: loader[2], lambda: next(iter(loader)), held.release):
            try:
                use()
            except LayerError as error:
                said.append(error)

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert ["another thread holds layer 'model.layers.0'" in str(error) for error in said] == [True] * 3
    check(held, whole)
    held.release()
    taken: list[Any] = []

    def heir() -> None:
        taken.append(loader[2].index)
        loader[3].release()

    thread = threading.Thread(target=heir)
    thread.start()
    thread.join()
    assert taken == [2]
    check(loader[4], whole)


def test_an_exception_in_the_computation(loader: gpunvme.LayerLoader, whole: dict[str, Any]) -> None:
    def compute() -> None:
        for layer in loader:
            if layer.index == 3:
                raise RuntimeError("the user's")

    with pytest.raises(RuntimeError, match="the user's"):
        compute()
    for layer in loader:
        check(layer, whole)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"slots": 0}, ValueError, "slots is 0"),
        ({"budget_gpu": 1 << 30}, BudgetError, "it is budget_host"),
        ({"budget_host": 1000}, BudgetError, r"budget_host=1000 is too small: 2 slots .* take \d+ bytes at least"),
        ({"framework": "tf"}, ValueError, "framework is"),
        ({"framework": "buffer"}, gpunvme.SpanError, "for GPU memory"),
        ({"device": "cuda", "framework": "np"}, gpunvme.SpanError, "not on cuda"),
        ({"path": "nvme"}, gpunvme.PathError, "cannot carry this"),
        ({"path": "warp"}, gpunvme.PathError, "there is no path 'warp'"),
        ({"device": "tpu"}, ValueError, "unknown device"),
    ],
)
def test_options_that_cannot_be(checkpoint: Path, options: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        gpunvme.LayerLoader(checkpoint, **options)


def test_a_path_by_its_name(checkpoint: Path, whole: dict[str, Any]) -> None:
    with gpunvme.LayerLoader(checkpoint, framework="np", path="host") as loader:
        check(loader[1], whole)
        assert set(loader.stats().paths[str(checkpoint)]) == {"host"}


# --- what goes wrong on the way


def test_a_file_cut_meanwhile(tmp_path: Path, whole: dict[str, Any]) -> None:
    """The error comes with the layer that is not there, and names it; those before it are fine; it can be mended."""
    path = tmp_path / "model.safetensors"
    gpunvme.save_file(whole, path)
    data = path.read_bytes()
    with gpunvme.LayerLoader(path, framework="np", slots=3) as loader:
        bad = loader._layers[3]
        os.truncate(path, bad.runs[0].offset + 100)
        order: list[int] = []
        with pytest.raises(gpunvme.TruncatedError, match="shorter") as caught:
            go_on(loader, whole, order)
        lost = [
            layer.index for layer in loader._layers if any(r.offset + r.nbytes > bad.runs[0].offset for r in layer.runs)
        ]
        assert order == list(range(min(lost)))
        assert f"while reading layer {min(lost)} {loader.names[min(lost)]!r}" in caught.value.__notes__
        path.write_bytes(data)
        for layer in loader:
            check(layer, whole)


def test_reads_that_fail_come_out_where_they_belong(
    checkpoint: Path, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = layer_ring.many.read_many
    bad = {4}

    class Failing:
        def __init__(self, transfer: Any) -> None:
            self._transfer = transfer

        def __getattr__(self, name: str) -> Any:
            return getattr(self._transfer, name)

        def wait(self, timeout: float | None = None) -> Any:
            self._transfer.wait(timeout)
            raise gpunvme.FileError(5, "Input/output error", "drive")

    def read_many(parts: Any, **options: Any) -> Any:
        transfer = real(parts, **options)
        return Failing(transfer) if reading[-1] in bad else transfer

    reading: list[int] = []
    start = layer_ring.Slot.start

    def noted(self: Any, layer: Any, copy: Any, timeout: Any) -> None:
        reading.append(layer.index)
        start(self, layer, copy, timeout)

    monkeypatch.setattr(layer_ring.Slot, "start", noted)
    monkeypatch.setattr(layer_ring.many, "read_many", read_many)
    with gpunvme.LayerLoader(checkpoint, framework="np") as loader:
        order: list[int] = []
        with pytest.raises(gpunvme.FileError, match="Input/output error"):
            go_on(loader, whole, order)
        assert order == [0, 1, 2, 3]
        with pytest.raises(gpunvme.FileError):
            loader[4]
        bad.clear()
        check(loader[4], whole)


def test_extents_that_cannot_be(tmp_path: Path) -> None:
    path = tmp_path / "file"
    files.make(path, 1000)
    for extent, error, message in (
        ((path, 900, 101, "U8", None), gpunvme.RangeError, "bytes 900 to 1001 are not in"),
        ((path, -1, 10, "U8", None), gpunvme.RangeError, "bytes -1"),
        ((path, 0, 10, "F32", (2,)), gpunvme.FormatError, "does not have 10 bytes"),
        ((path, 0, 10, "F33", None), gpunvme.FormatError, "unknown dtype"),
        ((path, 0, 8, "F32", (-2, -1)), gpunvme.FormatError, "does not have 8 bytes"),
        ((tmp_path / "none", 0, 8, "F32", (2,)), gpunvme.MissingFileError, "none"),
    ):
        with pytest.raises(error, match=message):
            gpunvme.LayerLoader({"a": extent}, framework="np")
    with pytest.raises(gpunvme.FormatError, match="does not say what is where"):
        gpunvme.LayerLoader("nvme+soft:ram?size=1MiB", framework="np")


# --- sources


def test_shards_an_index_and_gguf(tmp_path: Path, whole: dict[str, Any]) -> None:
    names = sorted(whole)
    for number, part in enumerate((names[::2], names[1::2])):
        gpunvme.save_file(
            {name: whole[name] for name in part}, tmp_path / f"model-0000{number + 1}-of-00002.safetensors"
        )
    for source in (tmp_path, sorted(tmp_path.glob("*.safetensors"))):
        with gpunvme.LayerLoader(source, framework="np", slots=2) as loader:
            for layer in loader:
                check(layer, whole)
            assert sorted(loader.stats().paths) == [str(path) for path in sorted(tmp_path.glob("*.safetensors"))]


def test_gguf(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    import gguf_cases

    arrays = {
        name: np.random.default_rng(len(name)).random((40, 32), np.float32)
        for name in (
            "token_embd.weight",
            "blk.0.a.weight",
            "blk.0.bb",
            "blk.1.a.weight",
            "blk.1.bb",
            "output_norm.weight",
        )
    }
    gguf_cases.written(tmp_path / "model.gguf", {}, arrays)
    with gpunvme.LayerLoader(tmp_path / "model.gguf", framework="np") as loader:
        assert loader.names == ["front", "blk.0", "blk.1", "back"]
        for layer in loader:
            check(layer, arrays)


class Source:
    """Extents of a plain file."""

    def __init__(self, path: Any, whole: dict[str, Any], start: int = 0) -> None:
        self._path, self._whole, self._start = path, whole, start

    def extents(self) -> dict[str, tuple[Any, ...]]:
        found, at = {}, self._start
        for name, array in self._whole.items():
            found[name] = (self._path, at, array.nbytes, array.dtype, array.shape)
            at += array.nbytes
        return found


def test_plain_files(tmp_path: Path, whole: dict[str, Any]) -> None:
    """At odd offsets, too: what is not aligned in the file is aligned in the slot."""
    for start in (0, 3):
        path = tmp_path / f"file{start}"
        path.write_bytes(bytes(start) + b"".join(array.tobytes() for array in whole.values()))
        source = Source(path, whole, start)
        assert isinstance(source, gpunvme.LayerSource)
        with gpunvme.open(path) as file:
            for given in (source, source.extents(), Source(file, whole, start)):
                with gpunvme.LayerLoader(given, framework="np") as loader:
                    for layer in loader:
                        check(layer, whole)
            assert not file.closed  # it is the caller's


def test_bytes_without_a_type(tmp_path: Path) -> None:
    data = files.make(tmp_path / "file", 10_000)
    extents = {f"blk.{number}.all": (str(tmp_path / "file"), 1000 * number, 1000) for number in range(10)}
    with gpunvme.LayerLoader(extents, framework="np") as loader:
        found = b"".join(layer.tensors[f"blk.{layer.index}.all"].tobytes() for layer in loader)
    assert found == data


@pytest.mark.parametrize("lba", [512, 4096])
def test_a_raw_namespace(tmp_path: Path, whole: dict[str, Any], lba: int) -> None:
    """Tensors lie where they lie in blocks, and the path is the namespace's own."""
    image = tmp_path / "disk.img"
    data = b"".join(array.tobytes() for array in whole.values())
    image.write_bytes(bytes(lba) + data + bytes(-len(data) % 4096 + 4096 - lba))
    with gpunvme.nvme.open(f"soft:{image}?lba={lba}") as controller:
        for target, count in ((controller.namespace(1), 2), (controller.namespace(1), 3)):
            with gpunvme.LayerLoader(Source(target, whole, lba), framework="np", slots=count) as loader:
                for _ in range(2):
                    for layer in loader:
                        check(layer, whole)
                (paths,) = loader.stats().paths.values()
                assert set(paths) == {"nvme"}
    with gpunvme.LayerLoader(Source(f"nvme+soft:{image}?lba={lba}&nsid=1", whole, lba), framework="np") as loader:
        check(loader[4], whole)


# --- the end


def test_closed(checkpoint: Path) -> None:
    loader = gpunvme.LayerLoader(checkpoint, framework="np")
    layer = loader[0]
    loader.close()
    loader.close()
    for use in (lambda: loader[0], lambda: next(iter(loader)), lambda: layer.tensors):
        with pytest.raises(LayerError, match=r"closed|given back"):
            use()
    layer.release()  # does nothing
    assert "closed" in repr(loader)


def test_closed_in_the_middle_of_a_pass(checkpoint: Path) -> None:
    for stop in range(4):
        with gpunvme.LayerLoader(checkpoint, framework="np", slots=4) as loader:
            for layer in loader:
                if layer.index == stop:
                    break
    with pytest.raises(LayerError, match="closed"):
        for _ in loader:
            pass


def test_closed_while_another_thread_waits_for_a_layer(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A drive that does not answer must not keep anybody from ending."""
    asked = threading.Event()

    class Stuck:
        def __init__(self) -> None:
            self.stopped = threading.Event()

        @property
        def done(self) -> bool:
            return self.stopped.is_set()

        def wait(self, timeout: float | None = None) -> Any:
            asked.set()
            if not self.stopped.wait(60 if timeout is None else timeout):
                raise gpunvme.DeadlineExceeded("gave up waiting")
            raise gpunvme.Cancelled("cancelled")

        def cancel(self) -> None:
            self.stopped.set()

    loader = gpunvme.LayerLoader(checkpoint, framework="np")
    monkeypatch.setattr(layer_ring.many, "read_many", lambda *_, **__: Stuck())
    said: list[str] = []

    def consumer() -> None:
        try:
            loader[3]
        except LayerError as error:
            said.append(str(error))

    thread = threading.Thread(target=consumer)
    thread.start()
    assert asked.wait(30)
    with pytest.raises(LayerError, match="another thread is taking a layer"):
        loader[1]
    loader.close()
    thread.join(30)
    assert said == ["the loader was closed while a layer was waited for"]


@pytest.mark.timeout(20)
def test_opened_and_closed_leaves_nothing_open(checkpoint: Path) -> None:
    def opened() -> int:
        links = (f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd"))
        return sum(os.path.lexists(link) and os.readlink(link) == str(checkpoint) for link in links)

    gc.collect()
    before = opened()
    for _ in range(5):
        with gpunvme.LayerLoader(checkpoint, framework="np") as loader:
            loader[0]
        with pytest.raises(BudgetError):
            gpunvme.LayerLoader(checkpoint, framework="np", budget_host=1)
    del loader
    gc.collect()
    files.wait_until(lambda: opened() <= before)  # the engine's threads let go of a file a little later


def test_a_forked_child_is_refused_clearly(checkpoint: Path, whole: dict[str, Any]) -> None:
    with gpunvme.LayerLoader(checkpoint, framework="np") as loader:
        held = loader[2]
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                loader[3]
            except LayerError as error:
                os.write(writer, str(error).encode())
            loader.close()
            with gpunvme.LayerLoader(checkpoint, framework="np") as own:
                check(own[2], whole)
            os.write(writer, b"|own is fine")
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as pipe:
            assert pipe.read() == (
                "the loader belongs to the parent process, its reads run only there: make one here|own is fine"
            )
        assert os.waitpid(child, 0)[1] == 0
        check(held, whole)
        check(loader[3], whole)


def test_no_layers(tmp_path: Path, checkpoint: Path) -> None:
    gpunvme.save_file({}, tmp_path / "none.safetensors")
    for source, group in ((tmp_path / "none.safetensors", None), (checkpoint, lambda name: None)):
        with gpunvme.LayerLoader(source, framework="np", group=group) as loader:
            assert list(loader) == []
            assert (len(loader), loader.nbytes) == (0, 0)
            with pytest.raises(IndexError):
                loader[0]
