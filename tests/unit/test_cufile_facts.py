"""What the machine and cuFile's counters say, weighed: nothing is claimed that is not shown."""

from __future__ import annotations

import gzip
import json
import os
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpunvme.cufile import evidence, facts
from gpunvme.cufile.evidence import COMPAT, NVIDIA_FS, P2PDMA, Counts, judge
from gpunvme.paths import measured
from gpunvme.paths.measured import Rates, Record

if TYPE_CHECKING:
    from pathlib import Path


def counts(total: int = 0, nvidia_fs: int = 0, p2pdma: int = 0, posix: int = 0, unaligned: int = 0) -> Counts:
    return Counts(total, nvidia_fs, p2pdma, posix, unaligned, 0)


@pytest.mark.parametrize(
    ("counted", "more", "path", "proven", "says"),
    [
        (counts(4, 4), {"module": "2.26"}, NVIDIA_FS, True, "4 by nvidia-fs"),
        (counts(4, 4), {"module": "2.26", "kernel_rose": 9}, NVIDIA_FS, True, "counted 9, too"),
        (counts(4, 4), {"module": "2.26", "kernel_rose": 0}, COMPAT, False, "counted nothing"),
        (counts(4, 4), {}, COMPAT, False, "nvidia-fs is not loaded"),
        (counts(4, 0, 4), {"kernel_p2pdma": True}, P2PDMA, True, "4 by P2PDMA"),
        (counts(4, 0, 4), {}, P2PDMA, True, "the kernel does not tell"),
        (counts(4, 0, 4), {"kernel_p2pdma": False}, COMPAT, False, "the kernel has no P2PDMA"),
        (counts(4, 0, 0, 4), {"module": "2.26"}, COMPAT, True, "4 through host memory"),
        (counts(4, 3, 0, 1), {"module": "2.26"}, COMPAT, False, "mixed"),
        (counts(5, 4, 0, 0), {"module": "2.26"}, COMPAT, False, "1 of no kind"),
        (counts(3, 3), {"module": "2.26"}, COMPAT, False, "mixed"),  # fewer than were made
        (counts(0), {"module": "2.26"}, COMPAT, False, "no request"),
        (counts(4), {"module": "2.26"}, COMPAT, False, "4 of no kind"),
        (counts(4, -1, 5), {"module": "2.26"}, COMPAT, False, "went backwards"),
        (counts(4, 4), {"module": "2.26", "place": "nfs4 of a:/b, mounted with RDMA"}, NVIDIA_FS, True, "with RDMA"),
        (counts(5, 4, 0, 1), {"module": "2.26", "shared": True}, COMPAT, False, "other transfers"),
        (counts(9, 9), {"module": "2.26", "shared": True}, NVIDIA_FS, True, "other transfers"),
    ],
)
def test_judging(counted: Counts, more: dict[str, Any], path: str, proven: bool, says: str) -> None:
    told = judge(counted, 4, 0, **more)
    assert (told.path, told.proven) == (path, proven)
    assert says in told.reason


def test_heads_and_tails_may_pass_host_memory() -> None:
    assert judge(counts(6, 4, 0, 2, 2), 4, 2, module="2").path == NVIDIA_FS
    assert judge(counts(6, 3, 0, 3, 2), 4, 2, module="2").path == COMPAT
    assert judge(counts(6, 4, 0, 2, 2), 4, 2, module="2", shared=True).path == COMPAT


@given(
    counted=st.builds(Counts, *[st.integers(-2, 20)] * 6),
    bodies=st.integers(0, 10),
    edges=st.integers(0, 2),
    shared=st.booleans(),
    module=st.sampled_from([None, "2.26"]),
    rose=st.none() | st.integers(0, 3),
    kernel=st.sampled_from([None, True, False]),
)
def test_never_upward(
    counted: Counts,
    bodies: int,
    edges: int,
    shared: bool,
    module: str | None,
    rose: int | None,
    kernel: bool | None,
) -> None:
    told = judge(counted, bodies, edges, shared=shared, module=module, kernel_rose=rose, kernel_p2pdma=kernel)
    if told.path != COMPAT:
        assert told.proven
        assert counted.posix <= (0 if shared else edges)
        assert counted.nvidia_fs + counted.p2pdma > 0
        assert not (counted.nvidia_fs and (module is None or rose == 0))
        assert not (counted.p2pdma and kernel is False)
    assert told.reason


# --- nvidia-fs


def write(root: Path, name: str, text: str | bytes) -> None:
    place = root / name.lstrip("/")
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(text.encode() if isinstance(text, str) else text)


STATS = """GDS Version: 1.17.0.0
NVFS statistics(ver: 4.0)
NVFS Driver(version: 2.26.6)
IO stats: {switch}, peer IO stats: Disabled
Reads : n=12 ok=12 err=0 readMiB=4 io_state_err=0
Writes : n=7 ok=7 err=0 writeMiB=1 io_state_err=0 pg-cache=0
Ops : Read=0 Write=0 BatchIO=0
"""


def test_nvidia_fs(tmp_path: Path) -> None:
    assert facts.nvidia_fs(tmp_path) is None
    assert facts.nvidia_fs_counts(tmp_path) is None
    write(tmp_path, "/proc/driver/nvidia-fs/version", "version: 2.26.6\n")
    assert facts.nvidia_fs(tmp_path) == "2.26.6"
    write(tmp_path, "/proc/driver/nvidia-fs/stats", STATS.format(switch="Enabled"))
    assert facts.nvidia_fs_counts(tmp_path) == facts.KernelCounts(12, 7, counting=True)
    write(tmp_path, "/proc/driver/nvidia-fs/stats", STATS.format(switch="Disabled"))
    counted = facts.nvidia_fs_counts(tmp_path)
    assert counted is not None
    assert not counted.counting
    write(tmp_path, "/proc/driver/nvidia-fs/stats", "something else")
    assert facts.nvidia_fs_counts(tmp_path) is None


# --- P2PDMA


def test_kernel_p2pdma(tmp_path: Path) -> None:
    assert facts.kernel_p2pdma(tmp_path) is None
    write(tmp_path, "/proc/kallsyms", "0000 T one\n")
    assert facts.kernel_p2pdma(tmp_path) is None  # too few symbols to say no
    write(tmp_path, "/proc/kallsyms", "0000 T one\n" * 2000)
    assert facts.kernel_p2pdma(tmp_path) is False
    write(tmp_path, "/proc/kallsyms", "0000 T one\n" * 2000 + "0000 T pci_p2pdma_add_resource\n")
    assert facts.kernel_p2pdma(tmp_path) is True
    write(tmp_path, "/proc/config.gz", gzip.compress(b"# CONFIG_PCI_P2PDMA is not set\n"))
    assert facts.kernel_p2pdma(tmp_path) is False
    write(tmp_path, "/proc/config.gz", b"no gzip")
    assert facts.kernel_p2pdma(tmp_path) is True
    write(tmp_path, "/proc/sys/kernel/osrelease", "6.18\n")
    write(tmp_path, "/boot/config-6.18", "CONFIG_X=y\nCONFIG_PCI_P2PDMA=y\n")
    assert facts.kernel_p2pdma(tmp_path) is True


def test_static_bar1(tmp_path: Path) -> None:
    assert facts.static_bar1(tmp_path) is None
    write(tmp_path, "/proc/driver/nvidia/params", 'EnableMSI: 1\nRegistryDwords: ""\n')
    assert facts.static_bar1(tmp_path) is False
    write(tmp_path, "/proc/driver/nvidia/params", 'RegistryDwords: "RMForceStaticBar1=0x10;X=1"\n')
    assert facts.static_bar1(tmp_path) is False
    write(tmp_path, "/proc/driver/nvidia/params", 'RegistryDwords: "X=2;RmForceStaticBar1=1;Y=0"\n')
    assert facts.static_bar1(tmp_path) is True


# --- cufile.json

JSON = """{
    // NOTE : Application can override this "whole" file
    "logging": {
       // "dir": "/home/<xxxx>",
       "level": "ERROR"
    },
    "properties": {
        "allow_compat_mode": true, // with a comment
        "use_pci_p2pdma": false,
        "odd": "a // b, }",
    },
}
"""


def test_settings(tmp_path: Path) -> None:
    assert facts.settings(tmp_path, {}) == facts.Settings("")
    write(tmp_path, "/etc/cufile.json", JSON)
    told = facts.settings(tmp_path, {})
    assert (told.place, told.problem) == ("/etc/cufile.json", "")
    assert (told.force_compat, told.allow_compat, told.use_p2pdma) == (None, True, False)
    told = facts.settings(tmp_path, {"CUFILE_FORCE_COMPAT_MODE": "TRUE", "CUFILE_USE_PCIP2PDMA": "1"})
    assert (told.force_compat, told.use_p2pdma) == (True, True)
    write(tmp_path, "/mine.json", '{"properties": {"force_compat_mode": true}, "logging": {"dir": "/var/log"}}')
    told = facts.settings(tmp_path, {"CUFILE_ENV_PATH_JSON": "/mine.json"})
    assert (told.force_compat, told.log_directory) == (True, "/var/log")
    assert "cannot be read" in facts.settings(tmp_path, {"CUFILE_ENV_PATH_JSON": "/not/there"}).problem


@pytest.mark.parametrize("text", ["{", "[]", '{"properties": []}', '{"logging": 1}', "\0", '"properties"'])
def test_settings_that_are_not_understood(tmp_path: Path, text: str) -> None:
    write(tmp_path, "/etc/cufile.json", text)
    told = facts.settings(tmp_path, {})
    assert "not understood" in told.problem
    assert told.force_compat is None


@given(st.text(max_size=200))
def test_any_text_as_settings(text: str) -> None:
    facts._without_comments(text)


# --- where a file is


def test_places() -> None:
    def place(kind: str, transports: set[str], options: str = "rw", drives: tuple[str, ...] = ("x",)) -> facts.Place:
        return facts.Place(kind, "/dev/x", options, drives, frozenset(transports))

    assert place("ext4", {"pcie"}).rdma == ""
    assert place("ext4", {"pcie"}).status_bit == 4
    assert "NVMe over rdma" in place("xfs", {"rdma"}).rdma
    assert place("xfs", {"rdma"}).status_bit == 5
    assert "mounted with RDMA" in place("nfs4", set(), "rw,proto=rdma").rdma
    assert place("lustre", set()).status_bit == 0
    assert place("ext4", set(), drives=("sda",)).status_bit == 6
    assert place("ext4", {"pcie", "tcp"}).status_bit is None
    assert place("tmpfs", set()).in_memory


def test_the_place_of_a_file(tmp_path: Path) -> None:
    with open(tmp_path / "file", "wb") as file:
        found = facts.place_of(file.fileno())
        assert found.kind
        # A machine of our own making: a partition of an NVMe drive.
        number = os.fstat(file.fileno()).st_dev
        root = tmp_path / "root"
        write(root, f"/proc/self/fdinfo/{file.fileno()}", "pos:\t0\nmnt_id:\t31\n")
        mount = "31 1 259:2 / /data rw,noatime shared:1 - ext4 /dev/nvme0n1p1 rw,errors=remount-ro\n"
        write(root, "/proc/self/mountinfo", "30 1 0:1 / / rw - tmpfs none rw\n" + mount)
        write(root, "/sys/devices/nvme0n1/nvme0n1p1/partition", "1\n")
        write(root, "/sys/block/nvme0n1/device/transport", "pcie\n")
        (root / "sys/dev/block").mkdir(parents=True)
        link = root / f"sys/dev/block/{os.major(number)}:{os.minor(number)}"
        link.symlink_to(root / "sys/devices/nvme0n1/nvme0n1p1")
        found = facts.place_of(file.fileno(), root)
        assert (found.kind, found.drives, found.transports) == ("ext4", ("nvme0n1",), frozenset({"pcie"}))
        assert "noatime" in found.options


# --- records of measurements


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "gpunvme" / "paths.json"


def test_records_are_kept(cache: Path) -> None:
    record = Record({"host": Rates(5e9, 1e9), "cufile/compat": Rates(None, 2e9)}, 1 << 28, 1e9)
    assert measured.find("key") is None
    measured.keep("key", record)
    measured.keep("other", record)
    assert measured.find("key") == measured.find("other") == record
    assert [each.name for each in cache.parent.iterdir()] == ["paths.json"]
    assert "host hot 5.00 GB/s, cold 1.00 GB/s" in str(record)


def test_records_are_not_kept_for_ever(cache: Path) -> None:
    for number in range(measured._MOST_ENTRIES + 5):
        measured.keep(str(number), Record({"host": Rates(1.0, 1.0)}, 1, float(number)))
    assert measured.find("0") is None
    assert measured.find("5") is not None


@pytest.mark.parametrize(
    "entry",
    [1, {}, {"rates": {}}, {"rates": {"host": 1}, "nbytes": 1, "when": 1}]
    + [
        {"rates": {"host": {"hot": hot, "cold": 1}}, "nbytes": nbytes, "when": when}
        for hot, nbytes, when in [(-1, 1, 1), (0, 1, 1), ("x", 1, 1), (1, "x", 1), (1, 1, "x"), (1e999, 1, 1)]
    ],
)
def test_a_record_that_makes_no_sense(cache: Path, entry: Any) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text(json.dumps({"format": 1, "records": {"key": entry}}))
    assert measured.find("key") is None
    measured.keep("other", Record({"host": Rates(1.0, 1.0)}, 1, 1.0))
    assert json.loads(cache.read_text())["records"].keys() == {"other"}


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gpunvme").write_text("a file")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    measured.keep("key", Record({"host": Rates(1.0, 1.0)}, 1, 1.0))
    assert measured.find("key") is None


def test_the_faster_one() -> None:
    record = Record({"a": Rates(4.0, 1.0), "b": Rates(2.0, 2.0), "c": Rates(None, None)}, 1, 1.0)
    assert record.faster("b", "a", 0, 100)
    assert not record.faster("b", "a", 100, 0)
    assert record.faster("b", "a", 50, 50)
    assert not record.faster("a", "a", 1, 1)  # a tie changes nothing
    assert not record.faster("c", "a", 1, 1)
    assert not record.faster("d", "a", 1, 1)


def test_statistics_of_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evidence.library, "why_absent", lambda: "nothing is here")
    evidence.library.bindings.cache_clear()
    assert "nothing is here" in str(evidence.statistics(b"x" * 16))


@pytest.mark.parametrize(
    ("device", "entry", "missing"),
    [
        ("", None, False),  # a file system without a device: nothing is claimed
        ("254:0", None, True),
        ("254:0", "", True),
        ("254:0", "I:1\nE:ID_FS_TYPE=ext4\n", True),
        ("254:0", "I:1\nE:ID_FS_USAGE=\n", True),
        ("254:0", "I:1\nE:ID_FS_TYPE=ext4\nE:ID_FS_USAGE=filesystem\n", False),
    ],
)
def test_what_udev_does_not_have(tmp_path: Path, device: str, entry: str | None, missing: bool) -> None:
    """Whoever is in a container is told what to mount; whoever is not, is not sent after it."""
    if entry is not None:
        folder = tmp_path / "run" / "udev" / "data"
        folder.mkdir(parents=True)
        (folder / f"b{device}").write_text(entry)
    place = facts.Place("ext4", "/dev/vda", "rw", ("vda",), frozenset(), device)
    said = facts.missing_from_udev(place, tmp_path)
    assert bool(said) == missing
    assert not missing or ("/run/udev/data/b254:0" in said and "ext4 on vda" in said)
