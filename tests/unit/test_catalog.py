"""Catalogs as people use them: what is put in comes back, and what cannot be is refused with a reason."""

from __future__ import annotations

import contextlib
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import catalog_cases
import files
import gpunvme
from gpunvme.catalog import FilePart, Region

MIB = 1 << 20


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "catalog"


@pytest.fixture
def catalog(target: Path) -> Any:
    with gpunvme.Catalog.create(target) as made:
        yield made


ROWS = np.random.default_rng(0).standard_normal((300, 40)).astype(np.float32)


def test_regions_come_back_by_number_and_by_name(catalog: gpunvme.Catalog, target: Path) -> None:
    first = catalog.add(None, ROWS, name="rows")
    assert first == Region(1, "rows", MIB + 4096, ROWS.nbytes, 160, "F32", (300, 40), zlib.crc32(ROWS.tobytes()))
    assert catalog.add(17, b"some bytes").record_size == 1
    assert catalog.add(None, np.arange(5), name="ids").kind == 18
    catalog.close()
    with gpunvme.Catalog(target) as again:
        assert again.generation == 4
        assert [region.kind for region in again] == [1, 17, 18]
        assert len(again) == 3
        assert "rows" in again
        assert 17 in again
        assert "nothing" not in again
        assert 2 not in again
        assert again["rows"] is again[1]
        assert again.read_kind("rows").numpy().tobytes() == ROWS.tobytes()
        assert again.read_kind(1, 7, 2).shape == (2, 160)
        assert again.read_kind(1, 7, 2).numpy().tobytes() == ROWS[7:9].tobytes()
        assert again.read_kind(17, 5).numpy().tobytes() == b"bytes"
        assert again.read_kind(1, 300).nbytes == 0
        wanted = np.random.default_rng(1).integers(0, 300, 50)
        assert again.gather_kind("rows", wanted).numpy().tobytes() == ROWS[wanted].tobytes()
        assert again.last_transfer is not None
        assert "host" in str(again.last_transfer)
        assert again.verify() == []


def test_into_memory_of_the_callers(catalog: gpunvme.Catalog) -> None:
    catalog.add(1, ROWS)
    out = np.zeros((4, 40), np.float32)
    assert catalog.read_kind(1, 10, 4, out) is out
    assert np.array_equal(out, ROWS[10:14])
    assert catalog.gather_kind(1, [3, 3, 299, 0], out) is out
    assert np.array_equal(out, ROWS[[3, 3, 299, 0]])
    with pytest.raises(gpunvme.SpanError, match="640"):
        catalog.read_kind(1, 0, 4, bytearray(639))
    with pytest.raises(gpunvme.SpanError, match="cuda"):
        catalog.read_kind(1, 0, 4, out, "cuda:0")


def test_tensors(catalog: gpunvme.Catalog) -> None:
    arrays = {"a": ROWS, "scalar": np.array(7, np.int16), "none": np.zeros((0, 3)), "c": np.ones(3, np.complex64)}
    for name, array in arrays.items():
        catalog.add(None, array, name=name)
    catalog.add(99, b"raw")
    loaded = catalog.load(framework="np")
    assert loaded.pop("#99").tobytes() == b"raw"
    assert loaded.keys() == arrays.keys()
    for name, array in arrays.items():
        assert loaded[name].dtype == array.dtype
        assert np.array_equal(loaded[name], array)
    assert list(catalog.load(["c", 1], framework="np")) == ["c", "a"]


def test_extents_are_what_loaders_of_layers_need(catalog: gpunvme.Catalog) -> None:
    catalog.add(1, ROWS, name="rows")
    catalog.add(2, b"12345")
    file, offset, nbytes, dtype, shape = catalog.extents()["rows"]
    assert (nbytes, dtype, shape) == (ROWS.nbytes, "F32", (300, 40))
    assert file.read(offset, nbytes).numpy().tobytes() == ROWS.tobytes()
    assert catalog.extents()["#2"][2:] == (5, "U8", (5,))


def test_replace_and_delete(catalog: gpunvme.Catalog) -> None:
    catalog.add(1, b"first", name="x")
    catalog.add(2, b"second", name="y")
    assert catalog.replace("x", ROWS).name == "x"
    assert catalog.replace(2, b"other", name="z", record_size=5).record_size == 5
    assert catalog_cases.stored(catalog) == {1: ("x", ROWS.tobytes()), 2: ("z", b"other")}
    catalog.delete("z")
    assert catalog_cases.stored(catalog) == {1: ("x", ROWS.tobytes())}
    assert catalog.add(None, b"again", name="y").kind == 2


def test_a_change_is_valid_as_a_whole_or_not_at_all(catalog: gpunvme.Catalog, target: Path) -> None:
    catalog.add(1, b"one", name="x")
    before = catalog.regions
    with contextlib.suppress(ZeroDivisionError), catalog.change() as change:
        change.delete(1)
        change.add(2, ROWS)
        raise ZeroDivisionError
    assert catalog.regions == before
    with pytest.raises(gpunvme.CatalogError, match="finished"):
        change.add(3, b"late")
    with catalog.change() as change:
        change.replace("x", b"uno")
        change.add(2, b"two", name="y")
        with pytest.raises(gpunvme.CatalogError, match="'y' is that of kind 2"):
            change.replace("x", b"three", name="y")  # an error that is borne costs nothing else
        change.add(3, b"three")
        change.delete(3)
    catalog.close()
    with gpunvme.Catalog(target) as again:
        assert catalog_cases.stored(again) == {1: ("x", b"uno"), 2: ("y", b"two")}
        assert again.generation == 3


def test_contents_larger_than_a_piece_and_from_files(catalog: gpunvme.Catalog, tmp_path: Path) -> None:
    data = files.make(tmp_path / "source", 19 * MIB + 3)
    with gpunvme.open(tmp_path / "source") as source:
        catalog.add(1, FilePart(source, 5, len(data) - 5), name="part")
    catalog.add(2, data)
    assert catalog.read_kind(1).numpy().tobytes() == data[5:]
    assert catalog.read_kind(2).numpy().tobytes() == data
    seen: list[tuple[int, int]] = []
    assert catalog.verify(progress=lambda done, total: seen.append((done, total))) == []
    assert seen[-1] == (2 * len(data) - 5, 2 * len(data) - 5)
    with gpunvme.open(tmp_path / "source") as source, pytest.raises(gpunvme.RangeError, match="bytes 5 to"):
        catalog.add(3, FilePart(source, 5, len(data)))


def test_verify_names_what_is_damaged(catalog: gpunvme.Catalog, target: Path) -> None:
    for kind in (1, 2, 3):
        catalog.add(kind, ROWS)
    with target.open("r+b") as raw:
        raw.seek(catalog[2].offset + ROWS.nbytes - 1)
        raw.write(bytes([ROWS.tobytes()[-1] ^ 1]))
    assert catalog.verify() == [catalog[2]]
    assert catalog.verify([1, 3]) == []


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "number in use": ({"kind": 1}, "kind 1 is there already"),
    "name in use": ({"name": "x"}, "'x' is that of kind 1"),
    "negative number": ({"kind": -1}, "no number from 0"),
    "large number": ({"kind": 2**32}, "no number from 0"),
    "record size": ({"record_size": 7}, "records of 7"),
    "no record size": ({"record_size": 0}, "records of 0"),
    "dtype": ({"dtype": "F33"}, "unknown dtype 'F33'"),
    "shape": ({"dtype": "F32", "shape": (300, 41)}, r"no array of F32 with shape \[300, 41\]"),
    "negative shape": ({"dtype": "F32", "shape": (-300, -40)}, "no array of F32"),
    "shape alone": ({"shape": (3,)}, "needs a dtype"),
    "long name": ({"name": "x" * 4097}, "4097 bytes"),
    "name of half a character": ({"name": "\ud800"}, "cannot be stored"),
    "dimensions": ({"dtype": "F32", "shape": (300, 40, *[1] * 31)}, "33 dimensions"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_the_format_cannot_hold_is_refused_before_it_is_written(
    catalog: gpunvme.Catalog, target: Path, what: str
) -> None:
    catalog.add(1, b"one", name="x")
    size, generation = target.stat().st_size, catalog.generation
    options, message = BAD[what]
    with pytest.raises(gpunvme.CatalogError, match=message):
        catalog.add(options.get("kind"), ROWS, **{key: value for key, value in options.items() if key != "kind"})
    assert (target.stat().st_size, catalog.generation) == (size, generation)


def test_big_endian_arrays_are_refused(catalog: gpunvme.Catalog) -> None:
    with pytest.raises(gpunvme.SpanError, match="other order"):
        catalog.add(1, ROWS.astype(">f4"))


def test_what_is_not_there(catalog: gpunvme.Catalog) -> None:
    catalog.add(1, ROWS, name="x")
    for wrong in (2, "y"):
        for use in (catalog.read_kind, catalog.delete, catalog.__getitem__):
            with pytest.raises(gpunvme.CatalogError, match=f"no region {wrong!r}"):
                use(wrong)
    for index, count in ((-1, 1), (0, 301), (301, None), (5, -1), (300, 1)):
        with pytest.raises(gpunvme.RangeError, match="has 300 records"):
            catalog.read_kind(1, index, count)
    with pytest.raises(gpunvme.RangeError, match=r"index number 1 asks for record 300 \(2 of 3"):
        catalog.gather_kind(1, [0, 300, -1])


def test_closed_and_read_only(catalog: gpunvme.Catalog, target: Path) -> None:
    catalog.add(1, ROWS)
    with gpunvme.Catalog(target) as reader, pytest.raises(gpunvme.CatalogError, match="mode 'r\\+'"):
        reader.add(2, b"")
    catalog.close()
    for use in (
        catalog.verify,
        catalog.refresh,
        catalog.extents,
        lambda: catalog.read_kind(1),
        lambda: catalog.add(2, b""),
    ):
        with pytest.raises(ValueError, match="is closed"):
            use()


def test_numbers_and_alignment(tmp_path: Path) -> None:
    with gpunvme.Catalog.create(tmp_path / "wide", alignment=2 * MIB) as wide:
        assert wide.alignment == 2 * MIB
        for kind in (0, 2**32 - 1):
            assert wide.add(kind, b"x").offset % (2 * MIB) == 0
    for alignment in (0, 512, 4097, 12288, 1 << 31):
        with pytest.raises(gpunvme.CatalogError, match="alignment"):
            gpunvme.Catalog.create(tmp_path / "none", alignment=alignment)
        assert not (tmp_path / "none").exists()


def test_space_is_used_again(catalog: gpunvme.Catalog, target: Path) -> None:
    data = files.contents(MIB)
    catalog.add(1, data)
    for number in range(20):
        catalog.replace(1, data[number:])
    assert target.stat().st_size < 8 * MIB
    assert catalog.read_kind(1).numpy().tobytes() == data[19:]


def read_by_the_document(image: bytes) -> dict[int, tuple[str, bytes]]:
    """Another reader of the format, made from docs/catalog-format.md alone."""
    found = []
    for slot in (0, 65536):
        block = image[slot : slot + 512]
        if block[:8] == b"GPUNVMEC" and struct.unpack_from("<I", block, 508)[0] == zlib.crc32(block[:508]):
            version, regions = struct.unpack_from("<II", block, 8)
            generation, alignment, capacity, at, nbytes, checksum = struct.unpack_from("<QQQQQI", block, 32)
            assert (version, slot) == (1, 65536 * (generation % 2))
            found.append((generation, regions, alignment, capacity, at, nbytes, checksum))
    generation, regions, alignment, _, at, nbytes, checksum = max(found)
    table = image[at : at + nbytes]
    assert zlib.crc32(table) == checksum
    assert table[:8] == b"GPUNVMET"
    assert struct.unpack_from("<Q", table, 8)[0] == generation
    contents = {}
    place = 16
    for _ in range(regions):
        size, kind, begin, length, record, crc, _, dimensions, name_bytes = struct.unpack_from(
            "<IIQQQIHHH", table, place
        )
        name = table[place + 48 + 8 * dimensions :][:name_bytes].decode()
        contents[kind] = (name, image[begin : begin + length])
        assert (begin % alignment, length % record, zlib.crc32(contents[kind][1])) == (0, 0, crc)
        place += size
    assert place == nbytes
    return contents


def test_the_document_describes_the_format(catalog: gpunvme.Catalog, target: Path) -> None:
    catalog.add(1, ROWS, name="rows")
    catalog.add(80, b"abc", name="ümläut")
    catalog.add(7, b"")
    catalog.delete(1)
    catalog.add(None, ROWS[:7])
    stored = catalog_cases.stored(catalog)
    assert len(stored) == 3
    assert read_by_the_document(target.read_bytes()) == stored


def test_gathers_from_what_was_added_after_the_first_gather(catalog: gpunvme.Catalog) -> None:
    """Gathers copy from a mapping of the file, which has grown since."""
    for kind in (1, 2, 3):
        rows = ROWS + kind
        catalog.add(kind, rows)
        assert catalog.gather_kind(kind, np.arange(300)[::-1]).numpy().tobytes() == rows[::-1].tobytes()


def test_from_kinds_reads_what_nobody_described(tmp_path: Path) -> None:
    data = files.make(tmp_path / "disk", 64 * 512 + 100)
    with gpunvme.Catalog.from_kinds(tmp_path / "disk", {1: (8, 4 * 512), 5: (10, 1000, 100), 7: (64, 100)}) as kinds:
        assert [(region.kind, region.offset, region.records) for region in kinds] == [
            (1, 8 * 512, 4),
            (5, 10 * 512, 10),
            (7, 64 * 512, 100),
        ]
        assert kinds.read_kind(1, 1, 2).numpy().tobytes() == data[9 * 512 : 11 * 512]
        assert kinds.gather_kind(5, [9, 0]).numpy().tobytes() == data[6020:6120] + data[5120:5220]
        assert (kinds.generation, kinds.mode, kinds.refresh()) == (0, "r", False)
        with pytest.raises(gpunvme.CatalogError, match="no checksums"):
            kinds.verify()
        with pytest.raises(gpunvme.CatalogError, match="reading only"):
            kinds.add(2, b"")
    assert (tmp_path / "disk").read_bytes() == data
    for given in ((64, 101), (65, 0), (-1, 512), (0, -1), (2**60, 512)):
        with pytest.raises(gpunvme.RangeError, match="kind 3"):
            gpunvme.Catalog.from_kinds(tmp_path / "disk", {3: given})
    with pytest.raises(gpunvme.RangeError, match=r"10 bytes from block 65 on, which is byte 33280"):
        gpunvme.Catalog.from_kinds(tmp_path / "disk", {3: (65, 10)})
    for odd in ((1,), (1, 2, 3, 4), (0, 10, 3), (0, 10, 0)):
        with pytest.raises(gpunvme.CatalogError, match="kind 3"):
            gpunvme.Catalog.from_kinds(tmp_path / "disk", {3: odd})
    for wrong in ({3: (0.5, 10)}, {"3": (0, 10)}, {3: ("0", 10)}):
        with pytest.raises(TypeError):
            gpunvme.Catalog.from_kinds(tmp_path / "disk", wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("block", "start"), [(None, 3 * 512), (512, 3 * 512), (4096, 3 * 4096), (1, 3), (520, 3 * 520)]
)
def test_from_kinds_starts_at_a_block_and_not_at_a_byte(tmp_path: Path, block: int | None, start: int) -> None:
    """Regions may lie over each other, and end anywhere."""
    data = files.make(tmp_path / "disk", 20_000)
    given = {1: (3, 5000), 2: (4, 5), 3: (3, 1040, 8), 4: (0, 0)}
    with gpunvme.Catalog.from_kinds(tmp_path / "disk", given, block_size=block) as kinds:
        assert kinds.read_kind(1).numpy().tobytes() == data[start : start + 5000]
        assert kinds.read_kind(2).numpy().tobytes() == data[start // 3 * 4 :][:5]
        assert kinds.gather_kind(3, [129, 0]).numpy().tobytes() == data[start + 1032 :][:8] + data[start : start + 8]
        assert kinds.read_kind(4).numpy().tobytes() == b""
        expected = 1 if 5000 % (block or 512) else block or 512
        assert [region.record_size for region in kinds] == [expected, 1, 8, block or 512]


@pytest.mark.parametrize("block", [0, -512])
def test_from_kinds_refuses_blocks_that_cannot_be(tmp_path: Path, block: int) -> None:
    files.make(tmp_path / "disk", 20_000)
    with pytest.raises(gpunvme.CatalogError, match=f"blocks of {block} bytes"):
        gpunvme.Catalog.from_kinds(tmp_path / "disk", {1: (0, 10)}, block_size=block)


# --- what is there already is left alone


def test_files_with_data_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "data"
    data = files.make(path, 3 * MIB)
    with pytest.raises(gpunvme.CatalogError, match="there is no catalog"):
        gpunvme.Catalog(path, "r+")
    for word in (None, "data", ""):
        with pytest.raises(gpunvme.UnsafeDeviceError, match="holds data at byte 0") as caught:
            gpunvme.Catalog.create(path, overwrite=word)
        assert repr(str(path)) in str(caught.value)
    assert path.read_bytes() == data
    with gpunvme.Catalog.create(path, overwrite=str(path)) as made:
        made.add(1, b"x")
    with pytest.raises(gpunvme.UnsafeDeviceError, match="holds data"):
        gpunvme.Catalog.create(path)  # a catalog, too, is data
    with gpunvme.Catalog(path) as made:
        assert catalog_cases.stored(made) == {1: ("", b"x")}


def test_empty_and_reserved_files_are_taken(tmp_path: Path) -> None:
    for name, size in (("empty", 0), ("reserved", 32 * MIB)):
        with (tmp_path / name).open("wb") as file:
            file.truncate(size)
        with gpunvme.Catalog.create(tmp_path / name) as made:
            made.add(1, b"x")
        with gpunvme.Catalog(tmp_path / name) as made:
            assert made.verify() == []


def test_a_block_device(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(8 * MIB))
    with files.loop_device(image) as device:
        with gpunvme.Catalog.create(device) as made:
            made.add(1, ROWS, name="rows")
            with pytest.raises(gpunvme.CatalogError, match="no room"):
                made.add(2, bytes(7 * MIB))
            with pytest.raises(gpunvme.Error, match=r"in use|another"):
                gpunvme.Catalog(device, "r+")
        claimed = os.open(device, os.O_RDONLY | os.O_EXCL)  # as a mount does, in whatever namespace it is
        with pytest.raises(gpunvme.UnsafeDeviceError, match="in use by the kernel"):
            gpunvme.Catalog(device, "r+")
        os.close(claimed)
        with gpunvme.Catalog(device, "r+") as made:
            assert made.load(framework="np")["rows"].tobytes() == ROWS.tobytes()
            assert made.verify() == []
        with pytest.raises(gpunvme.UnsafeDeviceError, match=f"overwrite='{device}'"):
            gpunvme.Catalog.create(device)
        # A partition table at the end, as other tools leave one: nothing is written without the word.
        os.system(f"printf 'EFI PART' | dd of={device} bs=1 seek={8 * MIB - 512} conv=notrunc status=none")
        with pytest.raises(gpunvme.UnsafeDeviceError, match="partition table"):
            gpunvme.Catalog.create(device, overwrite="sda")
        with gpunvme.Catalog.create(device, overwrite=str(device)) as made:
            assert len(made) == 0
        with gpunvme.Catalog.create(device, overwrite=str(device)) as made:
            assert made._target.contents() != ""
    assert image.read_bytes()[-512:].strip(b"\0") == b""


def test_a_mounted_block_device_is_never_taken(tmp_path: Path) -> None:
    import shutil
    import subprocess

    if shutil.which("mkfs.ext4") is None:
        pytest.skip("mkfs.ext4 is not installed")
    image = tmp_path / "image"
    image.write_bytes(bytes(16 * MIB))
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
    (tmp_path / "mounted").mkdir()
    with files.loop_device(image) as device:
        done = subprocess.run(["mount", device, tmp_path / "mounted"], check=False, capture_output=True)
        if done.returncode != 0:
            pytest.skip(f"cannot mount: {done.stderr.decode().strip()}")
        try:
            with pytest.raises(gpunvme.UnsafeDeviceError, match="is mounted at"):
                gpunvme.Catalog.create(device, overwrite=str(device))
        finally:
            subprocess.run(["umount", tmp_path / "mounted"], check=True)
