"""The configuration space that guests see. If this failed, no kernel would find the controller, or give it memory."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpunvme.nvme.pci_config import CONFIG_BYTES, MSIX_BAR, MSIX_BAR_BYTES, MSIX_PBA, Offset, PciConfig


def number(config: PciConfig, offset: int, nbytes: int) -> int:
    return int.from_bytes(config.read(offset, nbytes), "little")


def capabilities(config: PciConfig) -> dict[int, int]:
    """Where each capability is, found as a kernel finds them."""
    found: dict[int, int] = {}
    assert number(config, Offset.STATUS, 2) & 1 << 4
    at = number(config, Offset.CAPABILITIES, 1)
    while at:
        assert at % 4 == 0
        assert at >= 0x40
        kind = number(config, at, 1)
        assert kind not in found
        found[kind] = at
        at = number(config, at + 1, 1)
    return found


def test_the_kernel_recognises_an_nvme_controller() -> None:
    config = PciConfig(0x4000, 8)
    assert number(config, Offset.REVISION, 4) >> 8 == 0x010802
    assert number(config, Offset.VENDOR, 2) == 0x1AF4
    assert number(config, 0x0E, 1) == 0  # header type: one function
    assert number(PciConfig(0x4000, 8, vendor_id=1, device_id=2), 0, 4) == 0x0002_0001


@pytest.mark.parametrize("nbytes", [0x2000, 0x4000, 1 << 20, 1 << 32])
def test_bars_tell_their_sizes_and_keep_addresses(nbytes: int) -> None:
    config = PciConfig(nbytes, 8)
    assert number(config, Offset.BARS, 4) & 0xF == 0x4  # memory, 64 bits, not prefetchable
    config.write(Offset.BARS, b"\xff" * 24)
    assert (-(number(config, Offset.BARS, 8) & ~0xF)) & (1 << 64) - 1 == nbytes
    others = [number(config, Offset.BARS + 4 * i, 4) for i in range(2, 6)]
    assert others == [0, 0, -MSIX_BAR_BYTES & 0xFFFF_FFFF, 0]
    address = 0xF_0000_0000 & -nbytes
    config.write(Offset.BARS, address.to_bytes(8, "little"))
    assert number(config, Offset.BARS, 8) == address | 0x4
    config.reset()
    assert number(config, Offset.BARS, 8) == 0x4


@pytest.mark.parametrize("nbytes", [0, 2048, 0x3000])
def test_bars_that_cannot_be_are_refused(nbytes: int) -> None:
    with pytest.raises(ValueError, match=f"BAR0 cannot have {nbytes} bytes"):
        PciConfig(nbytes, 8)


@pytest.mark.parametrize("vectors", [0, 2049])
def test_vectors_that_cannot_be_are_refused(vectors: int) -> None:
    with pytest.raises(ValueError, match=f"{vectors} MSI-X vectors"):
        PciConfig(0x4000, vectors)


def test_capabilities_are_found() -> None:
    config = PciConfig(0x4000, 2048)
    found = capabilities(config)
    assert set(found) == {0x01, 0x11, 0x10}  # power management, MSI-X, PCI Express
    at = found[0x11]
    assert number(config, at + 2, 2) & 0x7FF == 2047
    table, pending = number(config, at + 4, 4), number(config, at + 8, 4)
    assert table & 7 == pending & 7 == MSIX_BAR
    assert (table & ~7) + 2048 * 16 <= pending & ~7 == MSIX_PBA
    assert MSIX_PBA + 2048 // 8 <= MSIX_BAR_BYTES
    config.write(at + 2, b"\xff\xff")
    assert number(config, at + 2, 2) == 0xC7FF  # enable and mask can be set, the size cannot
    assert found[0x10] + 0x3C <= 0x100


def test_power_states_can_be_entered() -> None:
    config = PciConfig(0x4000, 8)
    at = capabilities(config)[0x01]
    config.write(at + 4, b"\x03")
    assert number(config, at + 4, 2) & 3 == 3
    config.write(at + 4, b"\x00")
    assert number(config, at + 4, 2) & 3 == 0


def test_a_function_level_reset_resets_everything() -> None:
    resets: list[int] = []
    config = PciConfig(0x4000, 8, lambda: resets.append(number(config, Offset.COMMAND, 2)))
    at = capabilities(config)[0x10]
    assert number(config, at + 4, 4) & 1 << 28  # it says that it can
    config.write(Offset.COMMAND, b"\x06\x04")
    assert number(config, Offset.COMMAND, 2) == 0x0406
    config.write(at + 8, b"\x00\x00")
    assert resets == []
    config.write(at + 8, b"\x00\x80")
    assert resets == [0x0406]
    assert number(config, Offset.COMMAND, 2) == 0
    config.write(at + 9, b"\x80")  # the upper byte alone
    assert len(resets) == 2


@given(st.lists(st.tuples(st.integers(-1, CONFIG_BYTES), st.binary(max_size=64))))
def test_any_writes_change_only_what_can_be_changed(writes: list[tuple[int, bytes]]) -> None:
    config = PciConfig(0x4000, 8)
    before = bytearray(config.read(0, CONFIG_BYTES))
    for offset, data in writes:
        if offset < 0 or offset + len(data) > CONFIG_BYTES:
            with pytest.raises(ValueError, match="outside"):
                config.write(offset, data)
        else:
            config.write(offset, data)
    after = config.read(0, CONFIG_BYTES)
    for fixed in (range(4), range(6, 0xC), range(0x2C, 0x3C), range(0x9C, CONFIG_BYTES)):
        assert after[fixed.start : fixed.stop] == before[fixed.start : fixed.stop]
    assert capabilities(config).keys() == {0x01, 0x11, 0x10}


def test_reads_outside_are_refused() -> None:
    with pytest.raises(ValueError, match="4095 to 4097"):
        PciConfig(0x4000, 8).read(4095, 2)
