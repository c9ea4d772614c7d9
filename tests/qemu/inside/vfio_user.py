"""In a guest of a QEMU with vfio-user-pci: our software controllers, driven by the kernel and nvme-cli.

0000:00:08.0 has 512-byte blocks and two namespaces of 32 MiB; 0000:00:09.0 has 4096-byte blocks and one of 128 MiB.
QEMU passes their registers, interrupts and this guest's memory on to a process of ours.
"""

from __future__ import annotations

import json
import mmap
import os
import random

from checking import check, modprobe, namespace_path, shell

from gpunvme.nvme.sysfs import controller_name, list_controllers

SMALL, LARGE = "0000:00:08.0", "0000:00:09.0"
MIB = 1 << 20


def device(address: str) -> str:
    return f"/dev/{controller_name(address)}"


def direct(path: str, data: bytes | None, offset: int, nbytes: int = 0) -> bytes:
    """Read or write past the page cache."""
    fd = os.open(path, os.O_RDWR | os.O_DIRECT)
    try:
        page = mmap.mmap(-1, nbytes or len(data))
        if data is None:
            assert os.preadv(fd, [page], offset) == nbytes
            return page[:]
        page[:] = data
        assert os.pwritev(fd, [page], offset) == len(data)
        return b""
    finally:
        os.close(fd)


def contents(seed: int, nbytes: int) -> bytes:
    return random.Random(seed).randbytes(nbytes)


@check()
def kernel_takes_them() -> dict[str, object]:
    modprobe("nvme", "crc32c_generic", "ext4")
    for address, nsid in ((SMALL, 1), (SMALL, 2), (LARGE, 1)):
        namespace_path(address, nsid)
    found = {each.function.address: each for each in list_controllers()}
    assert (found[SMALL].serial, found[LARGE].serial) == ("small", "large"), found
    assert found[SMALL].state == found[LARGE].state == "live"
    assert [(each.nbytes, each.block_size) for each in found[SMALL].namespaces] == [(32 * MIB, 512)] * 2
    assert [(each.nbytes, each.block_size) for each in found[LARGE].namespaces] == [(128 * MIB, 4096)]
    return {"model": found[SMALL].model}


@check()
def nvme_cli_identifies_them() -> dict[str, object]:
    who = json.loads(shell(f"nvme id-ctrl {device(SMALL)} --output-format=json"))
    assert who["sn"].strip() == "small", who
    assert who["nn"] >= 2, who
    what = json.loads(shell(f"nvme id-ns {namespace_path(LARGE)} --output-format=json"))
    assert what["nsze"] == 128 * MIB // 4096, what
    names = json.loads(shell(f"nvme list-ns {device(SMALL)} --output-format=json"))
    assert [each["nsid"] for each in names["nsid_list"]] == [1, 2], names
    health = json.loads(shell(f"nvme smart-log {device(SMALL)} --output-format=json"))
    assert health["critical_warning"] == 0, health
    shell(f"nvme error-log {device(SMALL)}")
    return {"id-ctrl": {key: who[key] for key in ("mn", "fr", "mdts", "oncs", "vwc")}}


@check()
def kernel_reads_back_what_it_wrote() -> None:
    for seed, (address, nsid) in enumerate(((SMALL, 1), (SMALL, 2), (LARGE, 1))):
        path = namespace_path(address, nsid)
        direct(path, contents(seed, 8 * MIB), 16 * MIB)
        direct(path, contents(seed + 10, 4096), 16 * MIB + 12288)
    for seed, (address, nsid) in enumerate(((SMALL, 1), (SMALL, 2), (LARGE, 1))):
        wanted = bytearray(contents(seed, 8 * MIB))
        wanted[12288:16384] = contents(seed + 10, 4096)
        assert direct(namespace_path(address, nsid), None, 16 * MIB, 8 * MIB) == wanted


@check()
def many_at_once() -> None:
    """Several processes, so that several queues are busy; sizes that split, and that end within a page."""
    disk = namespace_path(SMALL)
    jobs = " ".join(
        f"dd if={disk} of=/dev/null bs={size} count={(8 * MIB) // size} skip={(16 * MIB) // size} iflag=direct &"
        for size in (512, 4096, 65536, 1 << 20, 3 * 512)
    )
    shell(f"{jobs} wait")
    shell(f"dd if={disk} of=/run/copy bs=1M count=8 skip=16 2>/dev/null")
    data = bytearray(contents(0, 8 * MIB))
    data[12288:16384] = contents(10, 4096)
    with open("/run/copy", "rb") as copy:
        assert copy.read() == data


@check(seconds=120)
def file_system_lives_on_it() -> None:
    disk = namespace_path(LARGE)
    shell(f"mkfs.ext4 -q -F {disk} && mkdir -p /mnt/s && mount -t ext4 {disk} /mnt/s")
    written = {}
    for number in range(200):
        name = f"/mnt/s/d{number % 7}/f{number}"
        os.makedirs(os.path.dirname(name), exist_ok=True)
        written[name] = contents(1000 + number, random.Random(number).randrange(1, 200_000))
        with open(name, "wb") as file:
            file.write(written[name])
    for name in list(written)[::3]:
        os.unlink(name)
        del written[name]
    shell("sync && umount /mnt/s")
    shell(f"fsck.ext4 -f -n {disk}")
    shell(f"echo 3 >/proc/sys/vm/drop_caches; mount -t ext4 {disk} /mnt/s")
    for name, data in written.items():
        with open(name, "rb") as file:
            assert file.read() == data, name
    shell(f"umount /mnt/s && fsck.ext4 -f -n {disk}")


@check()
def other_commands() -> None:
    disk = namespace_path(SMALL, 2)
    shell(f"nvme flush {namespace_path(SMALL, 2)}")
    shell(f"nvme write-zeroes {disk} --start-block=32768 --block-count=7")
    assert direct(disk, None, 16 * MIB, 8192) == bytes(4096) + contents(1, 8192)[4096:]
    shell(f"blkdiscard --offset {20 * MIB} --length {MIB} {disk}")
    with open("/run/data", "wb") as file:
        file.write(contents(1, MIB)[65536 : 65536 + 4096])
    # Block counts are zero-based.
    where = f"--start-block={32768 + 128} --block-count=7 --data-size=4096 --data=/run/data"
    shell(f"nvme compare {disk} {where}")
    shell(f"nvme verify {disk} --start-block=32768 --block-count=100")


@check()
def wrong_commands_are_refused() -> None:
    """And the controller goes on."""
    disk = namespace_path(SMALL, 2)
    last = 32 * MIB // 512
    said = shell(f"nvme read {disk} --start-block={last} --block-count=0 --data-size=512 2>&1 || true")
    assert "LBA Out of Range" in said or "LBA_RANGE" in said, said
    said = shell(f"nvme admin-passthru {device(SMALL)} --opcode=0xf7 2>&1 || true")
    assert "Invalid Command Opcode" in said or "INVALID_OPCODE" in said, said
    said = shell(f"nvme get-log {device(SMALL)} --log-id=0xbf --log-len=512 2>&1 || true")
    assert "Invalid Log Page" in said or "INVALID_LOG_PAGE" in said, said
    assert direct(disk, None, 16 * MIB + 4096, 4096) == contents(1, 8192)[4096:]


@check()
def reset_and_driver_come_back() -> None:
    shell(f"nvme reset {device(SMALL)}")
    disk = namespace_path(SMALL)
    assert direct(disk, None, 16 * MIB, 4096) == contents(0, 4096)
    # Shut down in order, given up, found again.
    with open(f"/sys/bus/pci/devices/{SMALL}/driver/unbind", "w") as unbind:
        unbind.write(SMALL)
    assert not os.path.exists(disk)
    with open("/sys/bus/pci/drivers/nvme/bind", "w") as bind:
        bind.write(SMALL)
    assert direct(namespace_path(SMALL), None, 16 * MIB, 4096) == contents(0, 4096)


@check()
def what_the_host_will_look_for() -> None:
    path = namespace_path(SMALL, 2)
    direct(path, contents(77, MIB), 0)
    shell(f"nvme flush {namespace_path(SMALL, 2)}")
