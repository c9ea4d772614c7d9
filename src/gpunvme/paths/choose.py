"""The only place that ranks paths."""

from __future__ import annotations

from collections.abc import Iterator

from gpunvme import _native
from gpunvme.errors import CudaError, PathError
from gpunvme.memory import CPU, Device
from gpunvme.paths.absent import ABSENT
from gpunvme.paths.base import NAMES, Path, Source, Verdict
from gpunvme.paths.gpu_nvme import GpuNvmePath
from gpunvme.paths.host import HostPath
from gpunvme.paths.nvme import NvmePath

HOST = HostPath()
# In the order of preference: another one is taken where both were seen, and it was faster.
PATHS: tuple[Path, ...] = (HOST, NvmePath(), GpuNvmePath())
_FIRST_GPU = Device("cuda", 0)


class Explanation:
    """Every path, usable or not, with the reason; prints as a table."""

    def __init__(self, device: Device, verdicts: tuple[Verdict, ...], chosen: str | None) -> None:
        self.device = str(device)
        self.verdicts = verdicts
        self.chosen = chosen

    def __iter__(self) -> Iterator[Verdict]:
        return iter(self.verdicts)

    def __len__(self) -> int:
        return len(self.verdicts)

    def __str__(self) -> str:
        width = max(len(verdict.path) for verdict in self.verdicts)
        lines = [
            f"{'->' if verdict.path == self.chosen else '  '} {verdict.path:{width}}  "
            f"{'yes' if verdict.usable else 'no '}  {verdict.reason}"
            for verdict in self.verdicts
        ]
        return "\n".join(lines)


def explain(file: Source, device: Device, forced: str = "auto") -> Explanation:
    """Ask every path what it can do."""
    verdicts = [*(path.verdict(file, device) for path in PATHS), *ABSENT]
    verdicts.sort(key=lambda verdict: NAMES.index(verdict.path))
    try:
        chosen = choose(file, device, forced).name
    except (PathError, CudaError):
        chosen = None
    return Explanation(device, tuple(verdicts), chosen)


def choose(file: Source, device: Device, forced: str = "auto", *, gather: bool = False) -> Path:
    """Pick the path for transfers, or for gathers, between a file and a device.

    Raises
    ------
    PathError
        If ``forced`` names a path that cannot carry it or that does not exist.
    CudaError
        If no path reaches the device.
    """
    if forced != "auto":
        return _forced(file, device, forced)
    usable = [path for path in PATHS if path.verdict(file, device).usable]
    if not usable:
        raise CudaError(f"no path reaches {device}: {_why_not(file, device)}")
    best, *others = usable
    for path in others:
        speed, ours = path.speed(file, device, gather=gather), best.speed(file, device, gather=gather)
        if speed is not None and ours is not None and speed > ours:
            best = path
    return best


def check_forced(file: Source, forced: str) -> None:
    """Check that a path that was asked for by name can carry this file, to memory of the host or of a GPU.

    Raises
    ------
    PathError
        If it cannot, or does not exist.
    """
    try:
        choose(file, CPU, forced)
    except PathError:
        choose(file, _FIRST_GPU, forced)


def _why_not(file: Source, device: Device) -> str:
    """The reason of the path that is meant for this source."""
    meant = HOST if isinstance(file, _native.SourceFile) else PATHS[1]
    return meant.verdict(file, device).reason


def _forced(file: Source, device: Device, forced: str) -> Path:
    for path in PATHS:
        if path.name == forced:
            verdict = path.verdict(file, device)
            if not verdict.usable:
                raise PathError(f"path {forced!r} cannot carry this: {verdict.reason}")
            return path
    for verdict in ABSENT:
        if verdict.path == forced:
            raise PathError(f"path {forced!r} cannot carry this: {verdict.reason}")
    names = ", ".join(repr(name) for name in ["auto", *(path.name for path in PATHS)])
    raise PathError(f"there is no path {forced!r}; use one of {names}")
