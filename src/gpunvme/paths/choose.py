"""The only place that ranks paths."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from gpunvme import _native
from gpunvme.errors import CudaError, Error, PathError
from gpunvme.memory import CPU, Device
from gpunvme.paths.base import NAMES, Path, Source, Verdict
from gpunvme.paths.cufile import COMPAT, CufilePath
from gpunvme.paths.cufile import NAMES as CUFILE_NAMES
from gpunvme.paths.gpu_nvme import GpuNvmePath
from gpunvme.paths.host import HostPath
from gpunvme.paths.nvme import NvmePath
from gpunvme.paths.p2pdma import P2pdmaPath

if TYPE_CHECKING:
    from gpunvme.p2pdma.mappings import Mapping
    from gpunvme.paths.measured import Record

HOST = HostPath()
# In the order of preference: another one is taken where both were seen, and it was faster.
PATHS: tuple[Path, ...] = (HOST, NvmePath(), GpuNvmePath())
# Chosen by measurement alone.
CUFILE: tuple[CufilePath, ...] = tuple(CufilePath(name, HOST) for name in CUFILE_NAMES)
# For memory of its own, or by name.
P2PDMA = P2pdmaPath()
_FIRST_GPU = Device("cuda", 0)

# From this size on a read takes longer than it takes to find out which path is the faster one.
_WORTH_CHOOSING = 1 << 20
_WORTH_MEASURING = 64 << 20


class Explanation:
    """Every path, usable or not, with the reason; prints as a table."""

    def __init__(
        self, device: Device, verdicts: tuple[Verdict, ...], chosen: str | None, measured: str | None = None
    ) -> None:
        self.device = str(device)
        self.verdicts = verdicts
        self.chosen = chosen
        self.measured = measured

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
        return "\n".join(lines + ([f"   {self.measured}"] if self.measured else []))


class Choice(NamedTuple):
    """A path, and whether every transfer between this file and this device shall take it."""

    path: Path
    always: bool


def explain(file: Source, device: Device, forced: str = "auto", *, measure: bool = False) -> Explanation:
    """Ask every path what it can do; ``measure`` the ones that only a measurement can rank."""
    measured = _measured(file, device, measure)
    verdicts = [path.verdict(file, device) for path in (*PATHS, *CUFILE, P2PDMA)]
    verdicts.sort(key=lambda verdict: NAMES.index(verdict.path))
    try:
        chosen = choose(file, device, forced).name
    except (PathError, CudaError):
        chosen = None
    return Explanation(device, tuple(verdicts), chosen, measured)


def explain_memory(file: Source, mapping: Mapping, forced: str = "auto") -> Explanation:
    """Ask every path what it can do for PCI memory that this process has mapped."""
    verdicts = [path.verdict(file, CPU) for path in (*PATHS, *CUFILE)]
    verdicts.append(P2PDMA.verdict_of(file, mapping))
    verdicts.sort(key=lambda verdict: NAMES.index(verdict.path))
    usable = {verdict.path for verdict in verdicts if verdict.usable}
    wanted = (P2PDMA.name, HOST.name) if forced == "auto" else (forced,)
    chosen = next((name for name in wanted if name in usable), None)
    return Explanation(CPU, tuple(verdicts), chosen)


def pick_for_memory(file: Source, mapping: Mapping, forced: str) -> Path | None:
    """Pick the path for PCI memory that this process has mapped; None: the same as for other memory of the host.

    Raises
    ------
    PathError
        If ``forced`` is ``"p2pdma"``, and the kernel cannot do it.
    """
    if not isinstance(file, _native.SourceFile):
        return None
    if forced == "auto":
        return P2PDMA
    if forced != P2PDMA.name:
        return None
    verdict = P2PDMA.verdict_of(file, mapping)
    if not verdict.usable:
        raise PathError(f"path {forced!r} cannot carry this: {verdict.reason}")
    return P2PDMA.strictly()


def choose(file: Source, device: Device, forced: str = "auto", *, gather: bool = False) -> Path:
    """Pick the path for reads of a whole file, or for gathers.

    Raises
    ------
    PathError
        If ``forced`` names a path that cannot carry it or that does not exist.
    CudaError
        If no path reaches the device.
    """
    return pick(file, device, forced, 0, None, gather=gather).path


def pick(
    file: Source,
    device: Device,
    forced: str,
    offset: int,
    nbytes: int | None,
    *,
    write: bool = False,
    gather: bool = False,
) -> Choice:
    """Pick the path for one transfer, of ``nbytes`` at ``offset``; None: of the whole file. Raises as `choose`."""
    if forced != "auto":
        return Choice(_forced(file, device, forced), True)
    usable = [path for path in PATHS if path.verdict(file, device).usable]
    if not usable:
        raise CudaError(f"no path reaches {device}: {_why_not(file, device)}")
    best, *others = usable
    for path in others:
        speed, ours = path.speed(file, device, gather=gather), best.speed(file, device, gather=gather)
        if speed is not None and ours is not None and speed > ours:
            best = path
    if best is not HOST or gather or not device.is_gpu or not isinstance(file, _native.SourceFile):
        return Choice(best, True)
    contest = _contest(file, device)
    if contest is None:
        return Choice(best, True)
    size = file.size() - offset if nbytes is None else nbytes
    if write or size < _WORTH_CHOOSING:
        return Choice(best, False)
    return Choice(contest.winner(file, device, offset, size), False)


def check_forced(file: Source, forced: str) -> None:
    """Check that a path that was asked for by name can carry this file, to memory of the host or of a GPU.

    Raises
    ------
    PathError
        If it cannot, or does not exist.
    """
    careful: tuple[CufilePath | P2pdmaPath, ...] = (*CUFILE, P2PDMA)
    for path in careful:
        if path.name == forced:  # more would open a driver, or needs the memory
            verdict = path.installed(file)
            if not verdict.usable:
                raise PathError(f"path {forced!r} cannot carry this: {verdict.reason}")
            return
    try:
        choose(file, CPU, forced)
    except PathError:
        choose(file, _FIRST_GPU, forced)


def _why_not(file: Source, device: Device) -> str:
    """The reason of the path that is meant for this source."""
    meant = HOST if isinstance(file, _native.SourceFile) else PATHS[1]
    return meant.verdict(file, device).reason


def _forced(file: Source, device: Device, forced: str) -> Path:
    for path in (*PATHS, *CUFILE, P2PDMA):
        if path.name == forced:
            if isinstance(path, CufilePath) and device.is_gpu and path.installed(file).usable:
                path.open()  # so that the verdict rests on what the driver says
            verdict = path.verdict(file, device)
            if not verdict.usable:
                raise PathError(f"path {forced!r} cannot carry this: {verdict.reason}")
            return path.strictly() if isinstance(path, CufilePath | P2pdmaPath) else path
    names = ", ".join(repr(name) for name in ["auto", *(path.name for path in (*PATHS, *CUFILE, P2PDMA))])
    raise PathError(f"there is no path {forced!r}; use one of {names}")


# --- cuFile against our own path: by measurement


class _Contest:
    """cuFile against our own path, for one file and device."""

    def __init__(self, rival: CufilePath, record: Record | None) -> None:
        self._rival = rival
        self._record = record
        self._tried = False

    def winner(self, file: _native.SourceFile, device: Device, offset: int, nbytes: int) -> Path:
        """The path that was measured to be the faster one for a range, as much of it as is in the page cache now."""
        if self._record is None and not self._tried and nbytes >= _WORTH_MEASURING:
            from gpunvme.paths import measure

            self._tried = True
            found = measure.measure(file, device, HOST, self._rival)
            self._record = None if isinstance(found, str) else found
        if self._record is None:
            return HOST
        hot = min(nbytes, _native.cached_bytes(file.fileno(), offset, nbytes) or 0)
        return self._rival if self._record.faster(self._rival.name, HOST.name, hot, nbytes - hot) else HOST


_contests: weakref.WeakKeyDictionary[_native.SourceFile, dict[Device, _Contest | None]] = weakref.WeakKeyDictionary()


def _contest(file: _native.SourceFile, device: Device) -> _Contest | None:
    """What has to be decided for each transfer; None where it is always our own path."""
    known = _contests.setdefault(file, {})
    if device not in known:
        known[device] = _new_contest(file, device)
    return known[device]


def _new_contest(file: _native.SourceFile, device: Device) -> _Contest | None:
    rival = _rival(file, device)
    if rival is None:
        return None
    from gpunvme.paths import measure, measured

    try:
        record = measured.find(measure.key(file, device))
    except Error:
        return None
    if record is None:
        # Compatibility mode reads into host memory and copies, as our own path does: that it might be faster is not
        # worth a driver opened, and seconds spent, without being asked. Where somebody had it measured, that counts.
        return None if rival.name == COMPAT else _Contest(rival, None)
    if not (record.faster(rival.name, HOST.name, 1, 0) or record.faster(rival.name, HOST.name, 0, 1)):
        return None
    return _Contest(rival, record)


def _rival(file: _native.SourceFile, device: Device) -> CufilePath | None:
    """The way that cuFile would go; None where it cannot be used."""
    return next((path for path in CUFILE if path.verdict(file, device).usable), None)


def _measured(file: Source, device: Device, now: bool) -> str | None:
    """What a measurement said or says, in words; None where there is nothing to measure."""
    if not device.is_gpu or not isinstance(file, _native.SourceFile):
        return None
    rival = _rival(file, device)
    if rival is None or not HOST.verdict(file, device).usable:
        return None
    from gpunvme.paths import measure, measured

    try:
        found = measure.measure(file, device, HOST, rival) if now else measured.find(measure.key(file, device))
    except Error as error:
        return f"not measured: {error}"
    if now:
        _contests.pop(file, None)
    if found is None:
        return f"host and {rival.name} were not measured here: explain(…, measure=True) does it"
    return str(found)
