"""Raw writes where somebody's data lies: refused before a byte is written, until the device is named once more.

If this failed, a typing error would cost a file system, or a catalog of weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import vfio_user_fakes as fakes
from vfio_user_fakes import serving

import gpunvme
from gpunvme import _native, nvme
from gpunvme.cli import main
from gpunvme.cli.exits import Exit

if TYPE_CHECKING:
    from collections.abc import Callable

socket = pytest.fixture(fakes.make_path)

SIZE = 8 << 20
BLOCK = np.full(4096, 7, np.uint8)
WRITES: dict[str, Callable[[Any], object]] = {
    "write_from": lambda namespace: namespace.write_from(BLOCK, 0),
    "write_pieces": lambda namespace: namespace.write_pieces([BLOCK, BLOCK], 0),
    "write_zeroes": lambda namespace: namespace.write_zeroes(0, 8),
    "trim": lambda namespace: namespace.trim([(0, 8)]),
    "as a file": lambda namespace: gpunvme.open(namespace, "r+").write_from(BLOCK, 0),
}


def with_catalog(path: Path) -> Path:
    """An image with a catalog of one generation, so that only its second superblock is there."""
    with path.open("wb") as image:
        image.truncate(SIZE)
    with gpunvme.Catalog.create(f"nvme+soft:{path}") as catalog:
        assert catalog.generation == 1
    return path


def with_file_system(path: Path) -> Path:
    data = bytearray(SIZE)
    data[0x438:0x43A] = b"\x53\xef"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize(("make", "what"), [(with_catalog, "gpunvme catalog"), (with_file_system, "file system")])
def test_data_on_a_controller_of_another_process(
    socket: Path, tmp_path: Path, make: Callable[[Path], Path], what: str, write: str
) -> None:
    image = make(tmp_path / "disk")
    before = image.read_bytes()
    controller = _native.SoftController({"path": bytes(image)})
    try:
        with serving(socket, controller):
            with nvme.open(f"vfio-user:{socket}") as opened:
                for _ in range(2):  # a refusal is no permission for the next one
                    with pytest.raises(gpunvme.UnsafeDeviceError, match=f"holds a {what}.*overwrite='{socket}'"):
                        WRITES[write](opened.namespace())
                assert image.read_bytes() == before
            with (
                nvme.open(f"vfio-user:{socket}", overwrite=str(socket) + "x") as opened,
                pytest.raises(gpunvme.UnsafeDeviceError, match="is not its name"),
            ):
                WRITES[write](opened.namespace())
            with nvme.open(f"vfio-user:{socket}", overwrite=str(socket)) as opened:
                WRITES[write](opened.namespace())
                opened.namespace().flush()
    finally:
        controller.stop()
    assert image.read_bytes()[:4096] in (BLOCK.tobytes(), bytes(4096))


def test_only_the_catalogs_writer_passes_where_a_catalog_is(socket: Path) -> None:
    """Whoever may write a catalog does not open the door for others, before, meanwhile or afterwards."""
    controller = _native.SoftController({"size": SIZE})
    try:
        with serving(socket, controller):
            with nvme.open(f"vfio-user:{socket}") as opened:
                namespace = opened.namespace()
                namespace.write_from(np.zeros(512, np.uint8), 100)  # nothing is there yet: anybody may
                with gpunvme.Catalog.create(namespace) as catalog:
                    catalog.add(1, b"one")
                    with pytest.raises(gpunvme.UnsafeDeviceError, match="gpunvme catalog"):
                        namespace.write_from(BLOCK, 0)
                    catalog.add(2, b"two")
            with nvme.open(f"vfio-user:{socket}") as opened, gpunvme.open(opened.namespace(), "r+") as file:
                with gpunvme.Catalog(file, "r+") as catalog:
                    catalog.replace(1, b"uno")
                with pytest.raises(gpunvme.UnsafeDeviceError, match="gpunvme catalog"):
                    file.write_from(BLOCK, 0)
            with gpunvme.Catalog(f"nvme+vfio-user:{socket}") as catalog:
                assert [catalog.read_kind(kind).numpy().tobytes() for kind in (1, 2)] == [b"uno", b"two"]
                assert catalog.verify() == []
    finally:
        controller.stop()


@pytest.mark.parametrize("name", ["disk", "odd%20disk"])
def test_the_command_line_on_an_image(
    tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    image = with_catalog(tmp_path / name.replace("%20", " "))
    (tmp_path / "block").write_bytes(BLOCK.tobytes())
    before = image.read_bytes()
    write = ["nvme", "write", f"soft:{name}?lba=4096", "block", "--lba", "2"]
    for word in ([], ["--overwrite", "yes"]):
        assert main([*write, *word]) == Exit.UNSAFE
        said = capfd.readouterr().err
        assert "holds a gpunvme catalog; it would be lost" in said
        assert f"overwrite={name!r}" in said
    assert image.read_bytes() == before
    assert main([*write, "--overwrite", name]) == Exit.OK
    assert image.read_bytes() == before[:8192] + BLOCK.tobytes() + before[12288:]


def test_namespaces_that_share_an_image(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    with path.open("wb") as image:
        image.truncate(3 * SIZE)
    with nvme.open(f"soft:{path}?namespaces=3") as controller:
        gpunvme.Catalog.create(controller.namespace(2)).close()
        for nsid in (1, 3):
            controller.namespace(nsid).write_from(BLOCK, 0)
        with pytest.raises(gpunvme.UnsafeDeviceError, match="gpunvme catalog"):
            controller.namespace(2).write_from(BLOCK, 0)
        gpunvme.Catalog(controller.namespace(2)).close()


def test_looking_at_an_image_sends_no_command(tmp_path: Path) -> None:
    """Faults are named by the number of the command that they meet: looking must not count."""
    path = with_file_system(tmp_path / "disk")  # an image's file system is its owner's own affair
    with nvme.open(f"soft:{path}?faults=error:0x280!#2") as controller:
        namespace = controller.namespace()
        namespace.write_from(BLOCK[:512], 0)
        with pytest.raises(gpunvme.CommandError):
            namespace.write_from(BLOCK[:512], 1)
    assert path.read_bytes()[:1024] == BLOCK[:512].tobytes() + bytes(512)
