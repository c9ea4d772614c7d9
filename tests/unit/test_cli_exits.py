"""What a script sees of an error: its exit status and one line, never a traceback."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from gpunvme import errors
from gpunvme.cli import main
from gpunvme.cli.bench import parse_size
from gpunvme.cli.exits import MEANINGS, CheckFailedError, Exit, NotInstalledError, error_dict, error_line, exit_status
from gpunvme.cli.output import duration, size, speed

if TYPE_CHECKING:
    from pathlib import Path

COMMANDS = ("demo", "load", "copy", "info", "bench", "doctor", "stats")


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (CheckFailedError("x"), 1),
        (errors.FormatError("x"), 3),
        (errors.RangeError("x"), 3),
        (errors.FileError(errno.EIO, "x", "f", 3), 4),
        (errors.TruncatedError(0, "x", "f", 3), 4),
        (FileNotFoundError(errno.ENOENT, "x", "f"), 4),
        (OSError(errno.ENOSPC, "x"), 4),
        (MemoryError(), 4),
        (errors.DeadlineExceeded("x"), 4),
        (errors.CudaError("x"), 5),
        (errors.PathError("x"), 5),
        (NotInstalledError("x"), 6),
        (ModuleNotFoundError("x"), 6),
        (errors.Cancelled("x"), 130),
        (KeyboardInterrupt(), 130),
    ],
)
def test_each_error_has_its_status(error: BaseException, status: int) -> None:
    assert exit_status(error) == status


def test_error_is_one_line_that_names_the_file() -> None:
    assert error_line(FileNotFoundError(2, "No such file or directory", "a b")) == "No such file or directory: 'a b'"
    assert "\n" not in error_line(errors.FormatError("first\nsecond", filename="f"))
    assert error_line(MemoryError()) == "out of memory"


def test_error_document_has_what_a_script_needs() -> None:
    document = error_dict(errors.FileError(errno.EIO, "Input/output error", "f", 4096))
    assert document == {
        "type": "FileError",
        "message": "Input/output error: 'f' at offset 4096",
        "exit_status": 4,
        "errno": errno.EIO,
        "filename": "f",
        "offset": 4096,
    }


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command_tells_the_exit_statuses(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == Exit.OK
    text = " ".join(capsys.readouterr().out.split())
    assert "--json" in text
    for meaning in MEANINGS.values():
        assert meaning.split(" (")[0].split(",")[0] in text


@pytest.mark.parametrize("arguments", [["copy"], ["nonsense"], ["load", "--nonsense", "x"]])
def test_usage_errors(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == Exit.USAGE
    assert capsys.readouterr().out == ""


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == Exit.OK
    assert capsys.readouterr().out.startswith("gpunvme")


@pytest.mark.parametrize("arguments", [["info"], ["load"], ["load", "--verify"], ["demo", "--checkpoint"]])
def test_missing_file(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = str(tmp_path / "absent.safetensors")
    assert main([*arguments, name]) == Exit.SYSTEM_REFUSED
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("gpunvme: ")
    assert name in told.err
    assert told.err.count("\n") == 1
    assert main([arguments[0], "--json", *arguments[1:], name]) == Exit.SYSTEM_REFUSED
    told = capsys.readouterr()
    assert told.err == ""
    assert json.loads(told.out)["error"]["errno"] == errno.ENOENT


def test_reader_that_goes_away_is_no_traceback(tmp_path: Path) -> None:
    # `gpunvme doctor | head -1`
    child = subprocess.Popen(
        [sys.executable, "-u", "-m", "gpunvme", "doctor", str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert child.stdout is not None
    child.stdout.close()
    _, told = child.communicate(timeout=60)
    assert told == b""
    assert child.returncode == Exit.BROKEN_PIPE


def test_import_of_the_library_does_not_pay_for_the_command_line() -> None:
    program = "import sys, gpunvme; print([name for name in ('rich', 'typer', 'torch') if name in sys.modules])"
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert told.stdout.strip() == "[]"


def test_command_line_starts_without_costly_modules() -> None:
    program = (
        "import sys, gpunvme.cli.app; print([name for name in ('torch', 'safetensors', 'gpunvme.bench', "
        "'gpunvme.doctor') if name in sys.modules])"
    )
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert told.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("text", "nbytes"), [("4096", 4096), ("4KiB", 4096), ("1.5 MiB", 3 << 19), ("2GB", 2 * 10**9), ("1gib", 1 << 30)]
)
def test_sizes(text: str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "x", "-1", "0", "nan", "1e99", "0.5", "4 parsecs"])
def test_what_is_no_size_is_a_usage_error(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--sizes", text]) == Exit.USAGE
    assert "is not a size" in " ".join(capsys.readouterr().err.split())


def test_figures_for_people() -> None:
    assert [size(number) for number in (0, 17, 1 << 20, 3 << 29)] == ["0 B", "17 B", "1.0 MiB", "1.5 GiB"]
    assert [duration(number) for number in (1.5, 0.021, 3e-6)] == ["1.50 s", "21.0 ms", "3 µs"]
    assert speed(2 * 10**9, 0.5) == "4.00 GB/s"
    assert speed(0, 0.0) == "–"
