"""`gpunvme doctor` where files are missing, torn or nonsense: every line stays a line.

A doctor that dies on the machine that is ill is of no use to its owner.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import doctor_machines as machines
from doctor_machines import MACHINES, probes, write_tree
from gpunvme.doctor import Level, System, checks, examine
from gpunvme.doctor.acs import redirects
from gpunvme.doctor.mounts import mount_of, parse_mountinfo
from gpunvme.doctor.nvme_admin import AdminAnswer

KMOD = {"/sys/module/gpunvme/version": "1", "/proc/driver/nvidia-fs/version": "GDS Version: 2.20.6"}
NONSENSE = st.one_of(
    st.just(None),
    st.binary(max_size=40),
    st.sampled_from(
        [
            b"",
            b"\0",
            b"-1",
            b"0x",
            b"99999999999999999999999",
            b"\xb2\xb3",
            "²³".encode(),
            b"9" * 5000,
            b"a\0b: c\n" * 9,
        ]
    ),
)


def run_unguarded(root: Path, admin: object) -> None:
    """Every check by itself: `examine` would hide what one of them throws."""
    system = System(root, probes(admin=admin))
    mount = mount_of("/data", parse_mountinfo(system.read("/proc/self/mountinfo") or ""))
    for topic, check in checks(system, "/data", mount, "").items():
        for finding in check():
            assert finding.fact, topic
            assert finding.level is Level.GREEN or finding.cost, finding


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(sorted(MACHINES)),
    picks=st.lists(st.tuples(st.integers(0, 10_000), NONSENSE), min_size=1, max_size=6),
    identify=st.binary(max_size=5000),
    health=st.one_of(st.binary(max_size=600), st.binary(min_size=512, max_size=512)),
)
def test_any_file_may_be_missing_or_nonsense(
    name: str, picks: list[tuple[int, bytes | None]], identify: bytes, health: bytes
) -> None:
    files = {**MACHINES[name], **KMOD}
    for at, content in picks:
        path = sorted(MACHINES[name])[at % len(MACHINES[name])]
        files.pop(path, None)
        if content is not None:
            files[path] = content
    root = Path(tempfile.mkdtemp())
    try:
        write_tree(root, files)
        run_unguarded(root, AdminAnswer(identify, health))
    finally:
        shutil.rmtree(root)


def test_every_file_of_the_server_garbled_in_turn(tmp_path: Path) -> None:
    files = {**machines.SERVER, **KMOD}
    write_tree(tmp_path, files)
    for name, content in files.items():
        path = tmp_path / name.lstrip("/")
        path.unlink()
        path.write_bytes(b"\xff\0 nonsense 0x \n\n:::")
        run_unguarded(tmp_path, "for root only")
        path.unlink()
        write_tree(tmp_path, {name: content})


def test_files_that_are_folders_and_links_that_go_round(tmp_path: Path) -> None:
    files = {**machines.SERVER, "/sys/bus/pci/devices/0000:0a:00.0": "->/sys/bus/pci/devices/0000:0a:00.0"}
    files.pop("/proc/meminfo")
    files["/proc/meminfo/folder"] = ""
    write_tree(tmp_path, files)
    run_unguarded(tmp_path, "for root only")


def test_check_that_fails_has_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(system: System) -> list[object]:
        raise ValueError("no such thing")

    monkeypatch.setattr("gpunvme.doctor.checks_kernel.check_kernel", broken)
    found = examine(System(tmp_path, probes()), "/data", None, "")
    (line,) = (each for each in found if each.topic == "kernel")
    assert line.level is Level.YELLOW
    assert "no such thing" in line.fact
    assert len(found) > 5


@given(st.binary(max_size=700))
def test_configuration_spaces_of_any_content(config: bytes) -> None:
    assert redirects(config) in {True, False, None}


@given(st.lists(st.integers(0, 2**32 - 1), min_size=0, max_size=40))
def test_capabilities_that_go_round_come_to_an_end(words: list[int]) -> None:
    body = b"".join(word.to_bytes(4, "little") for word in words)
    assert redirects(bytes(256) + body + bytes(512)) in {True, False, None}
    circle = bytes(256) + (0x100 << 20 | 1).to_bytes(4, "little") + bytes(64)
    assert redirects(circle) is None
