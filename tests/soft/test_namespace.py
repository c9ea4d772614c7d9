"""Blocks to memory and back, by every call that a user has, wherever the memory is and however it lies."""

import threading

import numpy as np
import pytest

import gpunvme
from files import contents
from gpunvme import nvme

SIZE = 4 << 20


@pytest.fixture(scope="module")
def written():
    """Two namespaces on one controller's memory, of known content: nothing here writes to the first 2 MiB."""
    with nvme.open(f"soft:ram?size={SIZE}&mdts=3&threads=2") as controller:
        namespace = controller.namespace()
        data = contents(SIZE)
        namespace.write_from(data)
        yield namespace, data


@pytest.mark.parametrize("skew", [0, 1, 2, 3, 4, 8, 511, 512, 4095])
def test_a_destination_may_start_anywhere(written, skew):
    namespace, data = written
    memory = np.zeros((1 << 20) + 8192, np.uint8)
    base = -memory.ctypes.data % 4096 + skew
    destination = memory[base : base + (1 << 20)]
    done = namespace.read_into(destination, 5)
    assert destination.tobytes() == data[2560 : 2560 + (1 << 20)]
    assert not memory[:base].any()
    assert not memory[base + (1 << 20) :].any()
    assert done.path == "nvme"
    assert done.nbytes == 1 << 20
    assert done.direct_bytes == 1 << 20
    # PRPs begin at any multiple of 4 bytes; everything else must pass through memory that does.
    assert (done.bounced_bytes == 0) == (skew % 4 == 0)


def test_nothing_can_be_read_at_no_cost(written):
    namespace, _ = written
    assert namespace.read_into(bytearray(0)).nbytes == 0
    assert namespace.read(namespace.blocks, 0).nbytes == 0
    assert namespace.gather([], out=bytearray(0)) == bytearray(0)
    assert namespace.read_pieces([]).nbytes == 0


@pytest.mark.parametrize("blocks", [1, 3, 8, 40])
def test_a_gather_packs_in_the_order_asked_for(written, blocks):
    namespace, data = written
    lbas = np.random.default_rng(3).integers(0, namespace.blocks - blocks, 500)
    lbas[7] = lbas[8]
    rows = namespace.gather(lbas, blocks).numpy()
    assert rows.shape == (500, blocks * 512)
    for row, lba in zip(rows, lbas, strict=True):
        assert row.tobytes() == data[lba * 512 : (lba + blocks) * 512]


def test_a_gather_takes_lists_and_fills_what_is_given(written):
    namespace, data = written
    out = bytearray(3 * 512 + 10)
    assert namespace.gather([9, 0, 9], out=out) is out
    assert out == data[9 * 512 : 10 * 512] + data[:512] + data[9 * 512 : 10 * 512] + bytes(10)


@pytest.mark.parametrize(
    "sizes", [(512,), (1, 511), (100, 924), (4096, 4096), (3, 4096, 1, 1020), (70000, 4, 588, 3136)]
)
def test_one_run_of_blocks_goes_to_many_pieces(written, sizes):
    namespace, data = written
    pieces = [np.zeros(size, np.uint8) for size in sizes]
    done = namespace.read_pieces(pieces, 11)
    assert b"".join(piece.tobytes() for piece in pieces) == data[11 * 512 : 11 * 512 + sum(sizes)]
    assert done.nbytes == sum(sizes)


def test_many_pieces_go_to_one_run_of_blocks():
    with nvme.open("soft:ram?size=1MiB&mdts=2") as controller:
        namespace = controller.namespace()
        pieces = [contents(size, size) for size in (5, 4091, 40000, 12, 5044)]
        namespace.write_pieces(pieces, 3)
        assert namespace.read(3, 96).numpy().tobytes() == b"".join(pieces)


def test_writes_touch_their_blocks_only():
    with nvme.open("soft:ram?size=1MiB&mdts=1") as controller:
        namespace = controller.namespace()
        data = contents(33 * 512)
        namespace.write_from(data, 100, fua=True)
        everything = namespace.read().numpy().tobytes()
        assert everything == bytes(51200) + data + bytes((1 << 20) - 51200 - len(data))


def test_blocks_can_be_zeroed_trimmed_verified_and_compared():
    with nvme.open("soft:ram?size=1MiB") as controller:
        namespace = controller.namespace()
        data = contents(1 << 20)
        namespace.write_from(data)
        namespace.write_zeroes(10, 20)
        namespace.trim([(100, 5), (200, 8)])
        namespace.verify(0, namespace.blocks)
        namespace.flush()
        now = namespace.read().numpy().tobytes()
        assert now[5120 : 30 * 512] == bytes(20 * 512)
        assert now[:5120] == data[:5120]
        assert now[30 * 512 : 100 * 512] == data[30 * 512 : 100 * 512]
        namespace.compare(data[:5120])
        with pytest.raises(gpunvme.CommandError, match=r"(?i)compare") as caught:
            namespace.compare(data[: 20 * 512])
        (failed,) = caught.value.failures
        assert (failed.sct, failed.sc) == (2, 0x85)


def test_more_ranges_than_one_command_takes_are_trimmed():
    with nvme.open("soft:ram?size=1MiB&lba=512") as controller:
        namespace = controller.namespace()
        namespace.trim([(lba, 1) for lba in range(0, 2000, 2)])
        assert controller.transport.controller.stats()["commands"] >= 4


@pytest.mark.parametrize(
    ("call", "error", "reason"),
    [
        (
            lambda ns: ns.read_into(bytearray(512), ns.blocks),
            gpunvme.RangeError,
            "has 8192 blocks; blocks 8192 to 8193",
        ),
        (lambda ns: ns.read_into(bytearray(512), -1), gpunvme.RangeError, "negative"),
        (lambda ns: ns.read(8000, 193), gpunvme.RangeError, "blocks 8000 to 8193"),
        (lambda ns: ns.read_into(bytearray(513)), gpunvme.SpanError, "no whole number"),
        (lambda ns: ns.read_into(bytes(512)), gpunvme.SpanError, "read-only"),
        (lambda ns: ns.read_into(bytearray(512), 0, 2), gpunvme.SpanError, "has 512 bytes; 1024"),
        (lambda ns: ns.write_from(bytes(100)), gpunvme.SpanError, "no whole number"),
        (lambda ns: ns.write_from(bytes(1024), ns.blocks - 1), gpunvme.RangeError, "blocks 8191 to 8193"),
        (lambda ns: ns.gather([0, 8192]), gpunvme.RangeError, r"read number 1 asks for blocks 8192 to 8193 \(1 of 2"),
        (lambda ns: ns.gather([0], 0), gpunvme.RangeError, "at least one"),
        (lambda ns: ns.gather([0.5]), TypeError, "integers"),
        (lambda ns: ns.gather([0], out=bytearray(10)), gpunvme.SpanError, "need 512"),
        (lambda ns: ns.read_pieces([bytearray(100), bytearray(100)]), gpunvme.SpanError, "200 bytes in all"),
        (lambda ns: ns.write_zeroes(0, 8193), gpunvme.RangeError, "blocks 0 to 8193"),
        (lambda ns: ns.trim([(8191, 2)]), gpunvme.RangeError, "blocks 8191 to 8193"),
    ],
)
def test_bad_requests_are_refused_before_anything_moves(written, call, error, reason):
    namespace, _ = written
    before = namespace.controller.transport.controller.stats()["commands"]
    with pytest.raises(error, match=reason):
        call(namespace)
    assert namespace.controller.transport.controller.stats()["commands"] == before


def test_a_transfer_goes_on_by_itself_and_can_be_waited_for(written):
    namespace, data = written
    destination = bytearray(SIZE)
    job = namespace.read_into(destination, wait=False)
    assert job.wait(30) is job
    assert job.done
    assert destination == data


def test_many_threads_share_the_queues(written):
    namespace, data = written
    errors = []

    def read(seed):
        try:
            places = np.random.default_rng(seed).integers(0, namespace.blocks - 64, 40)
            for lba in places:
                assert namespace.read(int(lba), 64).numpy().tobytes() == data[lba * 512 : (lba + 64) * 512]
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors


def test_progress_is_told_and_ends_at_the_end(written):
    namespace, _ = written
    seen = []
    namespace.read_into(bytearray(SIZE), progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (SIZE, SIZE)


def test_the_controllers_own_memory_is_reached_without_a_copy(written):
    namespace, data = written
    buffer = namespace.controller.buffer(65536)
    done = namespace.read_into(buffer, 8)
    assert done.bounced_bytes == 0
    assert buffer.numpy().tobytes() == data[4096 : 4096 + 65536]


def test_an_image_keeps_what_was_written(tmp_path):
    image = tmp_path / "100% sure.img"
    data = contents(1 << 20)
    uri = f"soft:{str(image).replace('%', '%25')}?size=2MiB&lba=4096"
    with nvme.open(uri) as controller:
        controller.namespace().write_from(data, 3)
    assert image.read_bytes() == bytes(3 * 4096) + data + bytes((1 << 20) - 3 * 4096)
    with nvme.open(uri.replace("size=2MiB&", "")) as controller:
        assert controller.namespace().read(3, 256).numpy().tobytes() == data


def test_an_image_serves_one_controller_at_a_time(tmp_path):
    image = tmp_path / "disk.img"
    with nvme.open(f"soft:{image}?size=1MiB"), pytest.raises(gpunvme.Error, match=r"in use by another.*disk\.img"):
        nvme.open(f"soft:{image}")


@pytest.mark.parametrize(
    ("nbytes", "options", "reason"),
    [
        (1000, "", "whole number of blocks"),
        (0, "", "empty|small|size"),
        (4096, "?size=8192", "size|small"),
        (512, "?lba=4096", "whole number of blocks"),
    ],
)
def test_an_image_that_cannot_be_a_namespace_is_refused(tmp_path, nbytes, options, reason):
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(nbytes))
    with pytest.raises(gpunvme.Error, match=reason):
        nvme.open(f"soft:{image}{options}")
    assert image.stat().st_size == nbytes
