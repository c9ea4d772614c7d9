"""`gpunvme doctor --probe` and `--fix`: figures that are formed rightly, and a script that harms nobody.

A probe that leaves memory page-locked, or a fix that runs by itself, is worse than none.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
from typing import TYPE_CHECKING

import pytest

import doctor_machines as machines
from doctor_machines import NVME, SERVER, probes, write_tree
from gpunvme.cli import main
from gpunvme.cli.doctor import script
from gpunvme.cli.exits import Exit
from gpunvme.doctor import Finding, Level, System
from gpunvme.doctor.measure import measure, probe_drive
from gpunvme.errors import CudaError

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each probe reads little: how fast it is does not matter here."""
    monkeypatch.setattr("gpunvme.doctor.measure._READ", 8 << 20)


class Gpu:
    """A GPU whose memory is the host's; counts what is open, and refuses what it is told to."""

    def __init__(self, refuses: str = "") -> None:
        self.refuses = refuses
        self.open: dict[str, int] = {}
        self.registered: list[tuple[int, int, bool]] = []
        self.copied = {"to_gpu": 0, "to_host": 0}
        self.closed = False
        self._memory: dict[int, ctypes.Array[ctypes.c_char]] = {}

    def _count(self, what: str, by: int) -> None:
        if by > 0 and what == self.refuses:
            raise CudaError(f"{what} is refused")
        self.open[what] = self.open.get(what, 0) + by

    def _new(self, nbytes: int) -> int:
        memory = ctypes.create_string_buffer(nbytes)
        self._memory[ctypes.addressof(memory)] = memory
        return ctypes.addressof(memory)

    def allocate(self, nbytes: int) -> int:
        self._count("memory", 1)
        return self._new(nbytes)

    def free(self, address: int) -> None:
        self._count("memory", -1)
        del self._memory[address]

    def allocate_host(self, nbytes: int) -> tuple[int, int]:
        self._count("host", 1)
        address = self._new(nbytes)
        return address, address

    def free_host(self, address: int) -> None:
        self._count("host", -1)
        del self._memory[address]

    def register(self, address: int, nbytes: int, *, io: bool = False) -> int:
        self._count("register", 1)
        self.registered.append((address, nbytes, io))
        return address

    def unregister(self, address: int) -> None:
        self._count("register", -1)

    def to_gpu(self, target: int, source: int, nbytes: int, stream: int) -> None:
        assert len(self._memory[target]) >= nbytes <= len(self._memory[source])
        self.copied["to_gpu"] += nbytes

    def to_host(self, target: int, source: int, nbytes: int, stream: int) -> None:
        assert len(self._memory[target]) >= nbytes <= len(self._memory[source])
        self.copied["to_host"] += nbytes

    def stream(self) -> int:
        self._count("stream", 1)
        return 7

    def synchronize(self, stream: int | None = None) -> None:
        assert stream in {7, None}

    def destroy(self, *, stream: int = 0, event: int = 0) -> None:
        self._count("stream", -1)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def server(tmp_path: Path) -> System:
    write_tree(tmp_path / "machine", SERVER)
    (tmp_path / f"machine/sys/bus/pci/devices/{NVME}/resource0").write_bytes(bytes(16384))
    return System(tmp_path / "machine", probes())


def test_every_probe_and_nothing_left_behind(server: System, tmp_path: Path) -> None:
    gpu = Gpu()
    found = {each.topic: each for each in measure(server, str(tmp_path), lambda number: gpu)}
    assert [each.level for each in found.values()] == [Level.GREEN] * 4
    assert "GB/s, O_DIRECT, 8 MiB" in found["probe: drive"].fact
    assert "host to GPU" in found["probe: copies"].fact
    assert "8 bytes there and back" in found["probe: round trip"].fact
    assert gpu.closed
    assert set(gpu.open.values()) == {0}
    assert gpu.copied["to_gpu"] == gpu.copied["to_host"] > 1 << 30
    ((_, nbytes, io),) = gpu.registered
    assert (nbytes, io) == (4096, True)
    assert os.listdir(tmp_path) == ["machine"]


@pytest.mark.parametrize("refuses", ["memory", "host", "stream"])
def test_probe_that_fails_says_why_and_frees_what_it_had(server: System, tmp_path: Path, refuses: str) -> None:
    gpu = Gpu(refuses)
    found = {each.topic: each for each in measure(server, str(tmp_path), lambda number: gpu)}
    assert found["probe: copies"].level is Level.YELLOW
    assert f"{refuses} is refused" in found["probe: copies"].fact
    assert set(gpu.open.values()) <= {0}
    assert gpu.closed


def test_doorbells_that_cannot_be_registered_or_mapped(server: System, tmp_path: Path) -> None:
    found = {each.topic: each for each in measure(server, str(tmp_path), lambda number: Gpu("register"))}
    assert "forwards doorbells" in found["probe: doorbells"].cost
    server.path(f"/sys/bus/pci/devices/{NVME}/resource0").unlink()
    found = {each.topic: each for each in measure(server, str(tmp_path), lambda number: Gpu())}
    assert "BAR0 cannot be mapped: No such file" in found["probe: doorbells"].fact


def test_without_cuda_only_the_drive_is_measured(tmp_path: Path) -> None:
    write_tree(tmp_path / "plain", machines.CLOUD_WITHOUT_GPU)
    found = measure(System(tmp_path / "plain", probes(cuda="no libcuda")), str(tmp_path))
    assert [each.topic for each in found] == ["probe: drive"]


def test_drive_probe_of_what_cannot_be_measured(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.write_bytes(b"x")
    for path in (small, tmp_path / "absent"):
        finding = probe_drive(str(path))
        assert finding.level is Level.YELLOW
        assert "gpunvme doctor --probe FILE" in finding.fix


def test_fixes_are_a_script_in_which_only_commands_are_commands(tmp_path: Path) -> None:
    evil = "name\ntouch pwned; $(touch pwned) `touch pwned`"
    findings = [
        Finding(Level.YELLOW, "drive", evil, cost=evil, fix=evil, commands=("true",)),
        Finding(Level.GREEN, "kernel", evil),
    ]
    lines = script(findings)
    assert [line for line in lines if line and not line.startswith("#")] == ["true"]
    subprocess.run(["sh", "-e"], input="\n".join(lines), text=True, check=True, cwd=tmp_path, timeout=20)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", machines.MACHINES)
def test_fixes_of_whole_machines_are_shell(name: str, tmp_path: Path) -> None:
    write_tree(tmp_path, machines.MACHINES[name])
    lines = script(machines.diagnose(tmp_path))
    subprocess.run(["sh", "-n"], input="\n".join(lines), text=True, check=True, timeout=20)


def test_fix_prints_and_runs_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sick = [Finding(Level.RED, "drive", "dead", cost="all", fix="reset", commands=(f"touch {tmp_path}/ran",))]
    monkeypatch.setattr("gpunvme.doctor.examine_machine", lambda path: list(sick))
    assert main(["doctor", "--fix", str(tmp_path)]) == Exit.CHECK_FAILED
    out = capsys.readouterr().out
    assert out.startswith("#!/bin/sh\n")
    assert f"\ntouch {tmp_path}/ran\n" in out
    assert not (tmp_path / "ran").exists()
    assert main(["doctor", "--json", str(tmp_path)]) == Exit.CHECK_FAILED
    (line,) = json.loads(capsys.readouterr().out)["findings"]
    assert line["commands"] == [f"touch {tmp_path}/ran"]
    assert main(["doctor", str(tmp_path)]) == Exit.CHECK_FAILED
    assert f"$ touch {tmp_path}/ran" in capsys.readouterr().out
