"""The typer application: its commands, and how their errors leave."""

from __future__ import annotations

import functools
import os
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

import gpunvme
from gpunvme.cli import accept as acceptance
from gpunvme.cli import bench, catalog, nvme, nvme_devices, tier
from gpunvme.cli.config import config
from gpunvme.cli.copy import copy
from gpunvme.cli.demo import demo
from gpunvme.cli.doctor import doctor
from gpunvme.cli.exits import MEANINGS, Exit, report_error
from gpunvme.cli.info import info
from gpunvme.cli.load import load
from gpunvme.cli.stats import stats
from gpunvme.errors import Error

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

EPILOG = "Exit status: " + "; ".join(f"{int(status)} {meaning}" for status, meaning in MEANINGS.items()) + "."

app = typer.Typer(
    name="gpunvme",
    help="Bytes between files and GPU memory by the fastest path that this machine has.",
    epilog=EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _reported(command: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a command so that an expected error becomes a line and an exit status, never a traceback."""

    @functools.wraps(command)
    def run_and_report(*args: Any, **options: Any) -> Any:
        try:
            command(*args, **options)
            sys.stdout.flush()
        except BrokenPipeError as error:
            if error.filename is not None:
                raise typer.Exit(report_error(error, as_json=options.get("json", False))) from error
            _forget_stdout()
            raise typer.Exit(Exit.BROKEN_PIPE) from error
        except (Error, OSError, MemoryError, KeyboardInterrupt) as error:
            raise typer.Exit(report_error(error, as_json=options.get("json", False))) from error
        except ImportError as error:
            # A package, or the engine, that is missing is the user's to install; a name missing in one is a bug.
            if not isinstance(error, ModuleNotFoundError) and error.name not in ("gpunvme", "gpunvme._native"):
                raise
            raise typer.Exit(report_error(error, as_json=options.get("json", False))) from error
        except RuntimeError as error:
            # torch's own, which can only be named where torch is imported: the GPU's memory is full.
            if type(error).__name__ != "OutOfMemoryError":
                raise
            full = MemoryError(str(error).partition("\n")[0])
            raise typer.Exit(report_error(full, as_json=options.get("json", False))) from error

    return run_and_report


def _forget_stdout() -> None:
    """Point stdout at nothing, so that the interpreter's last flush does not complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC), sys.stdout.fileno())


for _command in (demo, load, copy, catalog.pack, info, doctor, acceptance.accept, stats, config):
    app.command(epilog=EPILOG)(_reported(_command))

_bench = typer.Typer(cls=bench.BenchGroup, help="Measure this library, what people use today, and the limit.")
for _of_bench in (bench.run, bench.compare):
    _bench.command(epilog=EPILOG)(_reported(_of_bench))
app.add_typer(_bench, name="bench")

_nvme = typer.Typer(no_args_is_help=True, help="NVMe controllers, driven from user space.", epilog=EPILOG)
_nvme.command("list", epilog=EPILOG)(_reported(nvme_devices.list_controllers))
for _of_devices in (nvme_devices.topology, nvme_devices.bind, nvme_devices.unbind):
    _nvme.command(epilog=EPILOG)(_reported(_of_devices))
for _of_nvme in (nvme.identify, nvme.smart, nvme.regs, nvme.read, nvme.write, nvme.soft):
    _nvme.command(epilog=EPILOG)(_reported(_of_nvme))
app.add_typer(_nvme, name="nvme")

_tier = typer.Typer(no_args_is_help=True, help="Files on tiers of storage, moved by their accesses.", epilog=EPILOG)
for _of_tiers in (
    tier.status,
    tier.add,
    tier.rm,
    tier.migrate,
    tier.watch,
    tier.pin,
    tier.unpin,
    tier.capacity,
    tier.rebuild,
):
    _tier.command(epilog=EPILOG)(_reported(_of_tiers))
app.add_typer(_tier, name="tier")
_catalog = typer.Typer(no_args_is_help=True, help="Named regions in one file or on one device.", epilog=EPILOG)
for _of_catalogs in (catalog.ls, catalog.verify, catalog.rm):
    _catalog.command(epilog=EPILOG)(_reported(_of_catalogs))
app.add_typer(_catalog, name="catalog")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"gpunvme {gpunvme.__version__}")
        raise typer.Exit(Exit.OK)


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Bytes between files and GPU memory by the fastest path that this machine has."""
    del version


def run(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit status."""
    try:
        app(args=None if arguments is None else list(arguments), prog_name="gpunvme")
    except SystemExit as leaving:
        if isinstance(leaving.code, int):
            return leaving.code
        return Exit.OK if leaving.code is None else Exit.USAGE
    return Exit.OK
