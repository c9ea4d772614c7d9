"""The software controller, served over vfio-user, as a guest's kernel sees it through QEMU's own vfio-user client.

Neither QEMU nor the guest's driver shares a line with this package: they know the specifications only.
"""

from __future__ import annotations

import contextlib
import random
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import guest
import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.timeout(900)

MIB = 1 << 20


@contextlib.contextmanager
def served(image: str, socket: Path) -> Iterator[None]:
    """A process of ours that serves a controller."""
    command = [sys.executable, "-m", "gpunvme", "nvme", "soft", image, "--socket", str(socket)]
    said = socket.with_suffix(".said")
    with said.open("w") as output, subprocess.Popen(command, stdout=output, stderr=output) as server:
        try:
            give_up = time.monotonic() + 30
            while not socket.exists():
                assert server.poll() is None, said.read_text()
                assert time.monotonic() < give_up, "the server does not start"
                time.sleep(0.02)
            yield
            assert server.poll() is None, f"the server ended: {said.read_text()}"
        finally:
            server.terminate()
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                server.kill()
                raise
    assert server.returncode == 0, said.read_text()


def vfio_user_pci(socket: Path, address: str) -> list[str]:
    return ["-device", f'{{"driver":"vfio-user-pci","addr":"{address}","socket":{{"type":"unix","path":"{socket}"}}}}']


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("user")


@pytest.fixture(scope="module")
def checks(folder: Path) -> guest.Checks:
    small, large = folder / "small.sock", folder / "large.sock"
    shared_memory = ["-object", "memory-backend-memfd,id=memory,size=1G,share=on", "-machine", "memory-backend=memory"]
    with (
        served(f"{folder}/small.img?size=64MiB&namespaces=2&serial=small&mdts=4", small),
        served(f"{folder}/large.img?size=128MiB&lba=4096&serial=large&threads=2", large),
    ):
        return guest.run_checks(
            ["vfio_user"],
            folder / "guest",
            devices=lambda _: [*shared_memory, *vfio_user_pci(small, "08.0"), *vfio_user_pci(large, "09.0")],
            kernel=guest.DEBIAN,
            options="intel_iommu=off",
            qemu=guest.newer_qemu(),
            timeout=600,
        )


@pytest.mark.parametrize(("program", "name"), guest.checks_of("vfio_user"))
def test_software_controller(checks: guest.Checks, program: str, name: str) -> None:
    checks.expect(program, name)


def test_what_the_guest_wrote_is_in_the_image(checks: guest.Checks, folder: Path) -> None:
    checks.expect("vfio_user", "what_the_host_will_look_for")
    with (folder / "small.img").open("rb") as image:
        image.seek(32 * MIB)
        assert image.read(MIB) == random.Random(77).randbytes(MIB)
