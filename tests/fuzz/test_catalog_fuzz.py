"""Catalogs that somebody damaged, on purpose or not: an error that says where, never a crash, never wrong bytes."""

from __future__ import annotations

import struct
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

import catalog_cases
import gpunvme

HEAD = 1 << 20
REGIONS = {1: ("a", b"x" * 5000), 2: ("", b"y" * 4096), 70: ("name", b"")}


def an_image() -> bytes:
    with catalog_cases.recorder() as file:
        with gpunvme.Catalog.create(file) as catalog:
            for kind, (name, contents) in REGIONS.items():
                catalog.add(kind, contents, name=name)
        return file.read().numpy().tobytes()


IMAGE = an_image()
NEWEST = 0  # four generations: the newest lies in slot 0
TABLE_OFFSET, TABLE_BYTES = struct.unpack_from("<QQ", IMAGE, NEWEST + 56)


def sealed(image: bytearray) -> bytes:
    """The image with its checksums entered again, as an attacker would."""
    offset, nbytes = struct.unpack_from("<QQ", image, NEWEST + 56)
    if offset + nbytes <= len(image):
        struct.pack_into("<I", image, NEWEST + 72, zlib.crc32(image[offset : offset + nbytes]))
    struct.pack_into("<I", image, NEWEST + 508, zlib.crc32(image[NEWEST : NEWEST + 508]))
    return bytes(image)


def used(image: bytes) -> None:
    """Opens an image and does with it what people do."""
    with catalog_cases.memory_file(image) as file:
        for mode in ("r", "r+"):
            with gpunvme.Catalog(file, mode) as catalog:
                damaged = catalog.verify()
                found = catalog_cases.stored(catalog)
                for kind, stored in found.items():
                    if kind in REGIONS and catalog[kind] not in damaged:
                        assert len(stored[1]) == catalog[kind].nbytes
                catalog.extents()
                if mode == "r+":
                    catalog.add(None, b"new")
                    found.update({catalog.regions[-1].kind: ("", b"new")})
                    assert catalog_cases.stored(catalog) == found


def refusal(image: bytes) -> gpunvme.CatalogError | None:
    try:
        used(image)
    except gpunvme.CatalogError as error:
        return error
    return None


WORDS = st.sampled_from([0, 1, 47, 48, 4095, 4096, HEAD, 2**31, 2**32 - 1, 2**60, 2**63, 2**64 - 1, 2**64 - 4096])


@given(
    changes=st.lists(
        st.tuples(
            st.integers(0, 9) | st.integers(1000, 1000 + TABLE_BYTES // 8 - 1), WORDS | st.integers(0, 2**64 - 1)
        ),
        min_size=1,
        max_size=3,
    ),
    seals=st.booleans(),
)
def test_any_words_of_superblock_and_table(changes: list[tuple[int, int]], seals: bool) -> None:
    image = bytearray(IMAGE)
    for place, value in changes:
        at = NEWEST + 8 * place if place < 100 else TABLE_OFFSET + 8 * (place - 100)
        struct.pack_into("<Q", image, at, value)
    error = refusal(sealed(image) if seals else bytes(image))
    # No room is no damage: it has no place.
    assert error is None or error.offset is not None or "no room" in error.reason or "no number" in error.reason


@given(size=st.integers(0, len(IMAGE) - 1) | st.sampled_from([511, 512, 65536, 66047, HEAD, HEAD + 4096]))
def test_cut_off_at_any_place(size: int) -> None:
    """A file that lost its end must not look like the catalog that it was earlier."""
    error = refusal(IMAGE[:size])
    if size < len(IMAGE.rstrip(b"\0")):
        assert error is not None
    assert error is None or error.offset is not None


def test_a_damaged_table_is_an_error_and_not_the_generation_before() -> None:
    image = bytearray(IMAGE)
    image[TABLE_OFFSET + 20] ^= 1
    with pytest.raises(gpunvme.CatalogError, match=f"damaged: the table's checksum is wrong.*offset {TABLE_OFFSET}"):
        used(bytes(image))


def test_both_superblocks_damaged() -> None:
    image = bytearray(IMAGE)
    image[100] ^= 1
    image[65536 + 100] ^= 1
    with pytest.raises(gpunvme.CatalogError, match="damaged, in both its superblocks: the superblock's checksum"):
        used(bytes(image))


def test_a_version_of_the_future() -> None:
    image = bytearray(IMAGE)
    struct.pack_into("<I", image, 8, 2)
    with pytest.raises(gpunvme.CatalogError, match="version 2; this library reads version 1"):
        used(sealed(image))
