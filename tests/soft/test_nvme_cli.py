"""`gpunvme nvme …` as a person types it."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from files import contents
from gpunvme import nvme
from gpunvme.cli import main
from gpunvme.cli.exits import Exit


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(contents(1 << 20))
    return path


def as_json(capfd, *arguments):
    assert main(["nvme", *arguments, "--json"]) == Exit.OK
    return json.loads(capfd.readouterr().out)


def test_identify_says_what_the_controller_is(image, capfd):
    said = as_json(capfd, "identify", f"soft:{image}?lba=4096&mdts=3&serial=S1")
    assert said["serial"] == "S1"
    assert said["max_transfer_bytes"] == 32768
    assert said["namespaces"] == [{"nsid": 1, "blocks": 256, "block_size": 4096, "nbytes": 1 << 20}]
    assert main(["nvme", "identify", f"soft:{image}"]) == Exit.OK
    assert "namespace 1: 2048 blocks of 512 bytes, 1.0 MiB" in capfd.readouterr().out


def test_smart_and_registers_are_shown(image, capfd):
    assert as_json(capfd, "smart", f"soft:{image}")["smart"]["media_errors"] == 0
    said = as_json(capfd, "regs", f"soft:{image}?mqes=64&dstrd=2")
    assert said["fields"]["CAP"]["mqes"] == 63
    assert said["fields"]["CAP"]["dstrd"] == 2
    assert said["fields"]["CSTS"]["rdy"] == 0  # looking did not start it
    assert said["fields"]["CRTO"]["crwmt"] == said["fields"]["CAP"]["to"]
    assert {"CMBLOC", "CMBSZ", "CRTO"} <= said["registers"].keys()
    assert not {"PMRCAP", "BPINFO", "NSSR", "CMBMSC", "DOORBELLS"} & said["registers"].keys()
    assert main(["nvme", "regs", f"soft:{image}"]) == Exit.OK
    assert "CAP " in capfd.readouterr().out
    assert main(["nvme", "smart", f"soft:{image}"]) == Exit.OK
    assert "media errors" in capfd.readouterr().out


def test_blocks_are_read_to_files_and_pipes(image, tmp_path, capfd):
    out = tmp_path / "out"
    assert main(["nvme", "read", f"soft:{image}", "--lba", "2", "--blocks", "5", "--out", str(out)]) == Exit.OK
    assert out.read_bytes() == image.read_bytes()[1024:3584]
    capfd.readouterr()
    command = [sys.executable, "-m", "gpunvme", "nvme", "read", f"soft:{image}", "--lba", "2040"]
    assert subprocess.run(command, capture_output=True, check=True, timeout=60).stdout == image.read_bytes()[-4096:]


def test_a_file_is_written_to_blocks(image, tmp_path, capfd):
    before = image.read_bytes()
    source = tmp_path / "source"
    source.write_bytes(contents(4096, 9))
    said = as_json(capfd, "write", f"soft:{image}", str(source), "--lba", "8")
    assert said["write"]["path"] == "nvme"
    assert image.read_bytes() == before[:4096] + source.read_bytes() + before[8192:]


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["identify", "floppy:a"], Exit.BAD_INPUT, "not a known scheme"),
        (["identify", "soft:IMAGE?colour=red"], Exit.BAD_INPUT, "no option 'colour'"),
        (["identify", "soft:/nowhere/disk.img"], Exit.SYSTEM_REFUSED, "/nowhere/disk.img"),
        (["identify", "vfio-user:/nowhere/socket"], Exit.SYSTEM_REFUSED, "/nowhere/socket"),
        (["read", "soft:IMAGE", "--lba", "3000", "--blocks", "1"], Exit.BAD_INPUT, "has 2048 blocks"),
        (["read", "soft:IMAGE", "--namespace", "9"], Exit.SYSTEM_REFUSED, "no active namespace 9"),
        (["write", "soft:IMAGE", "/etc/hostname"], Exit.BAD_INPUT, "no whole number"),
        (["bind", "nonsense"], Exit.BAD_INPUT, "no PCI address"),
        (["unbind", "ffff:ff:1f.7"], Exit.SYSTEM_REFUSED, "ffff:ff:1f.7"),
    ],
)
def test_what_cannot_be_is_one_line_and_a_status(image, capfd, arguments, status, said):
    before = image.read_bytes()
    assert main(["nvme", *(each.replace("IMAGE", str(image)) for each in arguments)]) == status
    error = capfd.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert image.read_bytes() == before


def test_a_served_controller_is_reached_from_another_process_and_ends_when_told(image, tmp_path):
    socket = tmp_path / "controller"
    command = [sys.executable, "-m", "gpunvme", "nvme", "soft", str(image), "--socket", str(socket)]
    server = subprocess.Popen(command, stderr=subprocess.PIPE)
    try:
        give_up = time.monotonic() + 30
        while not socket.exists():
            assert server.poll() is None, server.stderr.read()
            assert time.monotonic() < give_up
            time.sleep(0.01)
        for _ in range(2):  # one client after another
            with nvme.open(f"vfio-user:{socket}") as controller:
                namespace = controller.namespace()
                assert namespace.read().numpy().tobytes() == image.read_bytes()
                namespace.write_from(contents(8192, 3), 5)
                namespace.flush()
            assert image.read_bytes()[2560 : 2560 + 8192] == contents(8192, 3)
        os.kill(server.pid, signal.SIGTERM)
        assert server.wait(20) in (0, Exit.INTERRUPTED, -signal.SIGTERM)
        assert not socket.exists()
    finally:
        server.kill()
        server.wait()
        server.stderr.close()
