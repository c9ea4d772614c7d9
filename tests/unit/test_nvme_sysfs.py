"""What sysfs says about controllers, on machines written by the test.

A wrong line here makes a user bind the wrong device, or believe that a GPU and a drive are near when they are not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from gpunvme.errors import TransportError, UriError
from gpunvme.nvme.sysfs import (
    Machine,
    find_function,
    functions,
    group_members,
    list_controllers,
    namespace_names,
    nvme_function,
    parse_bdf,
    topology,
)
from nvme_machine import BDF, MIB, Tree, simple

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("0000:01:00.0", "0000:01:00.0"),
        ("01:00.0", "0000:01:00.0"),
        ("0000:C1:1F.7", "0000:c1:1f.7"),
        (" 10000:e1:00.0 ", "10000:e1:00.0"),
        ("00000000:0a:00.0", "0000:0a:00.0"),
    ],
)
def test_addresses_become_sysfs_names(text: str, address: str) -> None:
    assert parse_bdf(text) == address


@pytest.mark.parametrize(
    "text", ["", "nvme0", "01:00", "0000:01:20.0", "0000:01:00.8", "0000:01:00.0/../x", "\u0660\u0661:00.0"]
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(UriError, match="0000:01:00"):
        parse_bdf(text)


def test_what_cannot_be_a_name_is_not_there(tmp_path: Path) -> None:
    """Names are made of what files say, and a torn file may say anything."""
    machine = Machine(tmp_path)
    for name in ("/nothing", "/" + "9" * 5000, "/a\0b"):
        assert not machine.exists(name)
    assert machine.exists("/")


def test_controller_with_everything(tmp_path: Path) -> None:
    simple(tmp_path)
    (found,) = list_controllers(Machine(tmp_path))
    assert (found.name, found.model, found.serial, found.state) == ("nvme0", "Samsung SSD 990 PRO 2TB", "S7KG", "live")
    assert [(each.name, each.nsid, each.nbytes, each.block_size) for each in found.namespaces] == [
        ("nvme0n1", 1, MIB, 512)
    ]
    function = found.function
    assert (function.driver, function.iommu_group, function.node, function.kind) == ("nvme", 12, 0, "NVMe")
    assert (function.speed, function.max_speed, function.width, function.max_width) == (16.0, 32.0, 4, 4)
    assert function.bars == (0x4000, 0, 0, 0, 0, 0)
    assert (function.root, function.upstream) == ("pci0000:00", ("0000:00:01.0",))


def test_controller_that_vfio_has_is_still_listed(tmp_path: Path) -> None:
    tree = Tree(tmp_path)
    tree.pci(driver="vfio-pci")
    (found,) = list_controllers(Machine(tmp_path))
    assert (found.function.driver, found.name, found.namespaces) == ("vfio-pci", None, ())


def test_multipath_names_lead_to_the_device_that_is_mounted(tmp_path: Path) -> None:
    # The hidden path nvme0c1n1 has no device file: checks that looked at it would find nothing in use.
    tree = simple(tmp_path)
    tree.controller(name="nvme1", entries=("nvme0c1n1", "nvme0c1n10", "nvme0c1n2", "hwmon1"))
    tree.path(f"/sys/bus/pci/devices/{BDF}/nvme/nvme0/nvme0n1").rmdir()
    for entry in list(tree.path(f"/sys/bus/pci/devices/{BDF}/nvme/nvme0").iterdir()):
        entry.unlink()
    tree.path(f"/sys/bus/pci/devices/{BDF}/nvme/nvme0").rmdir()
    assert namespace_names(BDF, Machine(tmp_path)) == ["nvme0n1", "nvme0n2", "nvme0n10"]


def test_what_is_missing_is_none(tmp_path: Path) -> None:
    tree = Tree(tmp_path)
    tree.file(f"/sys/bus/pci/devices/{BDF}/class", "0x010802")
    function = find_function(BDF, Machine(tmp_path))
    assert function is not None
    assert (function.driver, function.iommu_group, function.node, function.speed, function.width) == (None,) * 5
    assert function.bars == ()


def test_function_without_a_link_has_no_width(tmp_path: Path) -> None:
    tree = Tree(tmp_path)
    tree.pci(node=-1)
    tree.file(f"/sys/bus/pci/devices/{BDF}/current_link_width", "255")
    tree.file(f"/sys/bus/pci/devices/{BDF}/current_link_speed", "Unknown")
    function = find_function(BDF, Machine(tmp_path))
    assert function is not None
    assert (function.node, function.width, function.speed) == (None, None, None)


def test_refusals_name_the_controllers_that_there_are(tmp_path: Path) -> None:
    tree = simple(tmp_path)
    tree.pci("0000:02:00.0", code="0x020000", driver="e1000e", group=13)
    machine = Machine(tmp_path)
    with pytest.raises(TransportError, match=r"0000:02:00.0: no NVMe controller but Ethernet.*0000:01:00.0"):
        nvme_function("02:00.0", machine)
    with pytest.raises(TransportError, match=r"0000:09:00.0: there is no PCI function.*0000:01:00.0"):
        nvme_function("0000:09:00.0", machine)
    assert nvme_function("01:00.0", machine).address == BDF


def test_no_pci_bus_at_all(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    assert functions(machine) == []
    assert list_controllers(machine) == []
    with pytest.raises(TransportError, match="none"):
        nvme_function(BDF, machine)


def test_group_members(tmp_path: Path) -> None:
    tree = simple(tmp_path)
    tree.pci("0000:01:00.1", code="0x040300", driver="snd_hda_intel", group=12)
    tree.pci("0000:02:00.0", group=13)
    assert [each.address for each in group_members(12, Machine(tmp_path))] == [BDF, "0000:01:00.1"]


def test_topology_tells_a_switch_from_a_socket(tmp_path: Path) -> None:
    tree = Tree(tmp_path)
    switch = "pci0000:00/0000:00:01.0/0000:02:00.0"
    tree.pci("0000:04:00.0", above=f"{switch}/0000:03:00.0")
    gpus = {
        "0000:05:00.0": (f"{switch}/0000:03:01.0", 0),
        "0000:06:00.0": ("pci0000:00/0000:00:02.0", 0),
        "0000:87:00.0": ("pci0000:80/0000:80:01.0", 1),
        "0000:47:00.0": ("pci0000:40/0000:40:01.0", 0),
    }
    for address, (above, node) in gpus.items():
        tree.pci(address, code="0x030200", driver="nvidia", above=above, node=node)
    found = topology(Machine(tmp_path))
    assert [each.function.address for each in found.controllers] == ["0000:04:00.0"]
    assert {pair.gpu: (pair.kind, pair.through, pair.hops) for pair in found.pairs} == {
        "0000:05:00.0": ("switch", "0000:02:00.0", 2),
        "0000:06:00.0": ("host bridge", "pci0000:00", 4),
        "0000:87:00.0": ("other node", "", 4),
        "0000:47:00.0": ("node", "", 4),
    }
