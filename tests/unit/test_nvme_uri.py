"""URIs of controllers: what a person types must be understood, or refused with what would have been valid."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpunvme.errors import UriError
from gpunvme.nvme.uri import OPTIONS, parse_size, parse_uri, split_source


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("4096", 4096), ("64KiB", 65536), ("64 MiB", 64 << 20), ("2GiB", 2 << 30), ("1TiB", 1 << 40), ("0", 0)],
)
def test_sizes_are_understood(text, nbytes):
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "MiB", "-1", "1.5GiB", "64MB", "64mib", "1 2", "0x1000"])
def test_a_bad_size_is_refused(text):
    with pytest.raises(ValueError, match="is no size"):
        parse_size(text)


def test_options_are_converted():
    uri = parse_uri("soft:some/disk.img?size=64MiB&lba=4096&mdts=0x5&cqr=no&faults=drop@0.1,delay:5#3&seed=7")
    assert (uri.scheme, uri.path) == ("soft", "some/disk.img")
    assert uri.options == {
        "size": 64 << 20,
        "lba": 4096,
        "mdts": 5,
        "cqr": False,
        "faults": "drop@0.1,delay:5#3",
        "seed": 7,
    }


def test_a_path_may_hold_any_character_when_it_is_escaped():
    assert parse_uri("soft:100%25%3Fsure%26%20%C3%A4?size=1MiB").path == "100%?sure& ä"
    assert parse_uri("soft:%FF.img").path_bytes == b"\xff.img"


def test_an_address_may_hold_colons():
    assert parse_uri("pci:0000:01:00.0").path == "0000:01:00.0"


@pytest.mark.parametrize("text", ["", "disk.img", "scsi:0", "/dev/nvme0", "http://x", ":x"])
def test_an_unknown_scheme_is_refused_with_the_known_ones(text):
    with pytest.raises(UriError) as caught:
        parse_uri(text)
    assert all(f"{scheme}:" in str(caught.value) for scheme in OPTIONS)


def test_an_unknown_option_is_refused_with_the_known_ones():
    with pytest.raises(UriError, match=r"no option 'sise'\. Valid options: .*size"):
        parse_uri("soft:ram?sise=1MiB")
    with pytest.raises(UriError, match=r"vfio-user: has no option 'size'\. Valid options: none"):
        parse_uri("vfio-user:/run/x?size=1MiB")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("soft:ram?size=big", "option 'size': 'big' is no size"),
        ("soft:ram?lba=x", "option 'lba': 'x' is no number"),
        ("soft:ram?cqr=maybe", "option 'cqr': 'maybe' is neither"),
        ("soft:ram?lba=512&lba=4096", "'lba' is given twice"),
        ("soft:?size=1MiB", "names nothing"),
    ],
)
def test_a_bad_value_is_refused_with_its_name(text, reason):
    with pytest.raises(UriError, match=reason):
        parse_uri(text)


def test_a_source_is_taken_apart():
    assert split_source("nvme+soft:ram?size=1MiB&nsid=2&lba=512") == ("soft:ram?size=1MiB&lba=512", 2)
    assert split_source("nvme+pci:0000:01:00.0") == ("pci:0000:01:00.0", 1)
    assert split_source("nvme+pci:0000:01:00.0?nsid=3") == ("pci:0000:01:00.0", 3)


@pytest.mark.parametrize("nsid", ["0", "-1", "x", "4294967295", ""])
def test_a_bad_namespace_id_is_refused(nsid):
    with pytest.raises(UriError, match="is no namespace id"):
        split_source(f"nvme+soft:ram?nsid={nsid}")


@given(st.text(max_size=80))
def test_no_text_does_anything_else_than_parse_or_raise_our_error(text):
    for scheme in ("", "soft:", "pci:", "vfio-user:"):
        with contextlib.suppress(UriError):
            parse_uri(scheme + text)
