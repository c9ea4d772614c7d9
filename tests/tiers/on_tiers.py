"""What tests ask tiers for again and again."""

from __future__ import annotations

from pathlib import Path

import gpunvme

NAMES = ("nvme", "ssd", "hdd")


class Tiers(gpunvme.TierManager):
    def read(self, name: str) -> bytes:
        with self.open(name) as file:
            return file.read().numpy().tobytes()

    def tier_of(self, name: str) -> str:
        return next(file.tier for file in self.status().files if file.name == name)

    def accesses(self, name: str) -> int:
        return next(file.accesses for file in self.status().files if file.name == name)

    def touch(self, name: str, times: int) -> None:
        for _ in range(times):
            self.open(name).close()


def on_disk(directories: dict[str, Path]) -> dict[str, bytes]:
    """Every file on the tiers that is not ours, as tier/name."""
    return {
        f"{tier}/{path.relative_to(root).as_posix()}": path.read_bytes()
        for tier, root in directories.items()
        for path in sorted(root.rglob("*"))
        if path.is_file() and ".gpunvme-tier" not in path.parts
    }


def nothing_left_over(directories: dict[str, Path]) -> bool:
    """No temporary file is left on any tier."""
    return all(not list((root / ".gpunvme-tier" / "incoming").iterdir()) for root in directories.values())
