"""A namespace as a file: the same face, whatever is behind it."""

import numpy as np
import pytest

import gpunvme
from files import contents
from gpunvme import nvme

SIZE = 1 << 20


@pytest.fixture(params=["lba=512", "lba=4096&mdts=2"])
def image(request, tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(contents(SIZE))
    return f"nvme+soft:{path}?{request.param}", path


@pytest.mark.parametrize(
    ("offset", "nbytes"),
    [(0, SIZE), (1, SIZE - 1), (0, 1), (511, 2), (4095, 4098), (SIZE - 1, 1), (100, 0), (4096, 8192), (513, 70000)],
)
def test_any_range_of_bytes_can_be_read(image, offset, nbytes):
    uri, path = image
    with gpunvme.open(uri) as file:
        assert file.size == SIZE
        destination = bytearray(nbytes)
        done = file.read_into(destination, offset)
        assert destination == path.read_bytes()[offset : offset + nbytes]
        assert done.nbytes == nbytes
        assert nbytes == 0 or done.path == "nvme"


def test_rows_of_any_size_can_be_gathered(image):
    uri, path = image
    data = path.read_bytes()
    with gpunvme.open(uri) as file:
        for nbytes, step in ((4096, 4096), (100, 7), (512, 512)):
            offsets = np.random.default_rng(1).integers(0, (SIZE - nbytes) // step, 100) * step
            rows = file.gather(offsets, nbytes).numpy()
            assert [row.tobytes() for row in rows] == [data[at : at + nbytes] for at in offsets]
        assert file.last_transfer.path == "nvme"


def test_whole_blocks_can_be_written(image):
    uri, path = image
    data = contents(8192, 5)
    with gpunvme.open(uri, "r+") as file:
        done = file.write_from(data, 4096, fsync=True)
        assert done.path == "nvme"
        assert file.read(4096, 8192).numpy().tobytes() == data
    assert path.read_bytes()[4096:12288] == data


@pytest.mark.parametrize(("offset", "nbytes"), [(1, 4096), (0, 100), (4096, 4097)])
def test_parts_of_blocks_are_not_written(image, offset, nbytes):
    uri, path = image
    before = path.read_bytes()
    with gpunvme.open(uri, "r+") as file, pytest.raises(gpunvme.SpanError, match="whole blocks"):
        file.write_from(bytes(nbytes), offset)
    assert path.read_bytes() == before


def test_writes_beyond_the_end_and_without_leave_are_refused(image):
    uri, path = image
    with gpunvme.open(uri, "r+") as file, pytest.raises(gpunvme.RangeError, match="were to be written"):
        file.write_from(bytes(4096), SIZE)
    with gpunvme.open(uri) as file, pytest.raises(gpunvme.FileError, match="reading only"):
        file.write_from(bytes(4096))
    with pytest.raises(ValueError, match="neither created nor emptied"):
        gpunvme.open(uri, "w")
    assert path.read_bytes() == contents(SIZE)


def test_every_path_says_why_it_is_taken_or_not(image):
    uri, path = image
    with gpunvme.open(uri) as file:
        verdicts = {verdict.path: verdict for verdict in file.explain()}
        assert verdicts["nvme"].usable
        assert not verdicts["host"].usable
        assert file.explain().chosen == "nvme"
    with gpunvme.open(path) as file:
        verdicts = {verdict.path: verdict for verdict in file.explain()}
        assert not verdicts["nvme"].usable
        assert "nvme+URI" in verdicts["nvme"].reason
        assert file.explain().chosen == "host"
    with pytest.raises(gpunvme.PathError, match="'host' cannot carry this"):
        gpunvme.open(uri, path="host")
    with pytest.raises(gpunvme.PathError, match="'nvme' cannot carry this"):
        gpunvme.open(path, path="nvme")


def test_a_namespace_that_is_open_can_be_used_as_a_file(image):
    uri, path = image
    with nvme.open(uri.removeprefix("nvme+")) as controller:
        with gpunvme.open(controller.namespace()) as file:
            assert file.read(1, 10).numpy().tobytes() == path.read_bytes()[1:11]
        assert controller.namespace().read(0, 1).nbytes > 0  # closing the file left the controller alone


def test_a_namespace_has_no_descriptor_and_cannot_be_replaced(image):
    uri, _ = image
    with gpunvme.open(uri, "r+") as file:
        with pytest.raises(ValueError, match="no file descriptor"):
            file.fileno()
        with pytest.raises(ValueError, match="atomic"):
            file.write_from(bytes(4096), atomic=True)


def test_many_ranges_of_namespaces_are_one_transfer_but_not_with_files(image):
    uri, path = image
    data = path.read_bytes()
    places = [bytearray(1000), bytearray(5000)]
    with gpunvme.open(uri) as file:
        done = gpunvme.read_many([(file, 10, places[0]), (file, 4096, places[1])])
        assert done.nbytes == 6000
        assert places == [data[10:1010], data[4096:9096]]
        with gpunvme.open(__file__) as other, pytest.raises(gpunvme.SpanError, match="one transfer"):
            gpunvme.read_many([(file, 0, bytearray(10)), (other, 0, bytearray(10))])


def test_a_controller_opened_for_a_file_is_closed_with_it(image):
    uri, _ = image
    for _ in range(2):  # the image is locked while it is open
        with gpunvme.open(uri) as file:
            assert file.read(0, 1).nbytes == 1
    with pytest.raises(gpunvme.NvmeError, match="no active namespace 5"):
        gpunvme.open(uri + "&nsid=5")
    with gpunvme.open(uri) as file:
        assert file.size == SIZE


def test_a_checkpoint_can_be_read_from_a_transfer_that_nobody_waits_for(image):
    uri, path = image
    with gpunvme.open(uri) as file:
        destination = bytearray(SIZE)
        job = file.read_into(destination, wait=False)
        job.wait(30)
        assert destination == path.read_bytes()
