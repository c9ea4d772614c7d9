"""libcufile and the bindings of it (``cuda.bindings.cufile``): found, loaded, and called so that errors are errors.

What the bindings (13.5) leave to their callers: ``read`` and ``write`` return negative error codes as if they were
counts; of a -1, with its errno, they make a ValueError; counts of batch entries are unsigned. Those of 13.0 return no
count at all: with them, and for these two alone, the library's functions are called directly.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
import os
import re
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from gpunvme.errors import CudaError, CufileError, Error, FileError, PathError

_CUDA_DRIVER_ERROR = 5011
_FIRST_CODE = 5000  # CUFILEOP_BASE_ERR: what is below is an errno
_INSTALL = "pip install gpunvme[gds]"
_lock = threading.RLock()


@functools.cache
def why_absent() -> str:
    """Why cuFile cannot be used by this process, as far as looking at files can tell; "" if nothing is missing."""
    try:
        found = importlib.util.find_spec("cuda.bindings.cufile")
    except (ImportError, ValueError):
        found = None
    if found is None:
        return f"the bindings of cuFile are not installed: {_INSTALL}"
    if not os.environ.get("GPUNVME_LIBCUFILE") and library_file() is None:
        return f"libcufile is not installed: {_INSTALL}"
    return ""


def library_file() -> str | None:
    """Where a libcufile is installed, found without opening it; None if there is none."""
    folders = [Path(each) for each in os.environ.get("LD_LIBRARY_PATH", "").split(":") if each]
    for variable in ("CUDA_HOME", "CUDA_PATH", "CONDA_PREFIX"):
        if os.environ.get(variable):
            folders += [Path(os.environ[variable]) / name for name in ("lib64", "lib")]
    return installed_cufile(_ld_so_cache(), _pip_folders() + folders)


def installed_cufile(linker_cache: bytes, folders: Sequence[Path]) -> str | None:
    """Find a libcufile without opening it.

    Parameters
    ----------
    linker_cache
        The bytes of ``/etc/ld.so.cache``.
    folders
        Folders to look into as well, such as those of pip packages.

    Returns
    -------
    str or None
        The library's file name, or None if there is none.
    """
    for name in linker_cache.split(b"\0"):
        text = name.decode("utf-8", "replace")
        if text.startswith("/") and os.path.basename(text).startswith("libcufile.so"):
            return text
    for folder in folders:
        for found in sorted(folder.glob("libcufile.so*")):
            return str(found)
    return None


def _ld_so_cache() -> bytes:
    try:
        return Path("/etc/ld.so.cache").read_bytes()
    except OSError:
        return b""


def _pip_folders() -> list[Path]:
    """Return where the nvidia-cufile packages and a CUDA toolkit keep the library."""
    folders = [Path("/usr/local/cuda/lib64")]
    spec = importlib.util.find_spec("nvidia")
    for base in (spec.submodule_search_locations or []) if spec else []:
        folders += [Path(base) / part / "lib" for part in ("cufile", "cu13", "cu12")]
    return folders


@functools.cache
def bindings() -> ModuleType:
    """Load libcufile, and hand out the bindings.

    ``GPUNVME_LIBCUFILE`` names another library than the one that the bindings would find.

    Raises
    ------
    PathError
        If anything is missing; says what to install.
    """
    with _lock:
        if reason := why_absent():
            raise PathError(f"cuFile cannot be used: {reason}")
        set_log_file()
        named = os.environ.get("GPUNVME_LIBCUFILE")
        try:
            if named:
                ctypes.CDLL(named)  # the bindings look for libcufile.so.0 by name, which now is this one
            module = importlib.import_module("cuda.bindings.cufile")
            module.get_version()  # which loads the library
        except Exception as error:  # noqa: BLE001 - the bindings' own kinds, of several packages
            raise PathError(f"cuFile cannot be used: {_words(error)}; {_INSTALL}") from None
        return module


def set_log_file() -> None:
    """Name a log file, unless somebody has: libcufile drops cufile.log into the working directory otherwise."""
    from gpunvme.cufile.facts import settings
    from gpunvme.kept_files import cache_directory

    if "CUFILE_LOGFILE_PATH" in os.environ or settings().log_directory:
        return
    base = cache_directory()
    place = "/dev/null"
    try:
        base.mkdir(parents=True, exist_ok=True)
        if os.access(base, os.W_OK):
            place = str(base / "cufile.log")
    except OSError:
        pass
    os.environ["CUFILE_LOGFILE_PATH"] = place  # for libcufile's getenv, and that of the child that tries it first


def version() -> int:
    """Version of the loaded library: 1150 is 1.15."""
    return int(call("get_version"))


def version_text(number: int) -> str:
    """``1.15`` for 1150."""
    return f"{number // 1000}.{number % 1000 // 10}"


@functools.cache
def loaded_file() -> str:
    """The file that the loaded libcufile came from, as the kernel has it mapped."""
    try:
        with open("/proc/self/maps") as lines:
            for line in lines:
                place = line.split(maxsplit=5)[-1].strip()
                name = os.path.basename(place)
                if name.startswith("libcufile") and "rdma" not in name and place.startswith("/"):
                    return place
    except OSError:
        pass
    return os.environ.get("GPUNVME_LIBCUFILE") or library_file() or "unknown"


def call(function: str, *arguments: Any) -> Any:
    """Call a function of the bindings.

    Raises
    ------
    CufileError, CudaError, FileError
        If it fails.
    """
    module = bindings()
    try:
        return getattr(module, function)(*arguments)
    except Exception as error:  # noqa: BLE001 - cuFileError, ValueError, what the loader raises
        raise _error(function, error) from None


def moved(function: str, asked: int, *arguments: Any) -> int:
    """Call what returns a count of bytes.

    Raises
    ------
    CufileError, CudaError, FileError
        If it fails, or says that it moved more than was asked for.
    """
    direct = _counting(function)
    count = call(function, *arguments) if direct is None else direct(*arguments)
    if count == -1 and direct is not None:
        count = -(ctypes.get_errno() or 1)
    return checked_count(function, int(count), asked)


@functools.cache
def _counting(function: str) -> Any:
    """``read`` or ``write`` of the library itself, where the bindings throw its result away; None where they do not."""
    number = re.match(r"(\d+)\.(\d+)", str(getattr(sys.modules.get("cuda.bindings"), "__version__", "")))
    if number is None or (int(number[1]), int(number[2])) > (13, 0):
        return None
    bindings()
    entry = getattr(
        ctypes.CDLL(loaded_file(), use_errno=True), {"read": "cuFileRead", "write": "cuFileWrite"}[function]
    )
    entry.restype = ctypes.c_ssize_t
    entry.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64, ctypes.c_int64)
    return entry


def checked_count(function: str, count: int, asked: int) -> int:
    """A count of bytes, after making sure that it is one."""
    if count < 0:
        raise error_of_code(function, -count)
    if count > asked:
        raise CufileError(f"cuFile's {function} says that it moved {count} bytes where {asked} were asked for")
    return count


def error_of_code(function: str, code: int) -> Error:
    """Make our error of a code that came back as a negative count."""
    if code < _FIRST_CODE:
        if code == 1:
            return CufileError(f"cuFile's {function} failed without saying why")
        return FileError(code, f"cuFile's {function}: {os.strerror(code)}")
    if code == _CUDA_DRIVER_ERROR:
        return CudaError(f"cuFile's {function}: {_name_of(code)}")
    return CufileError(f"cuFile's {function}: {_name_of(code)}", code)


def _name_of(code: int) -> str:
    module = bindings()
    try:
        return f"{module.OpError(code).name} ({code}): {module.op_status_error(code)}"
    except Exception:  # noqa: BLE001 - of a version that the bindings do not know
        return f"error {code}"


def _error(function: str, error: Exception) -> Error:
    if isinstance(error, Error):
        return error
    status = getattr(error, "status", None)
    if isinstance(status, int):
        if status == _CUDA_DRIVER_ERROR:
            return CudaError(f"cuFile's {function}: {error}")
        return CufileError(f"cuFile's {function}: {error}", status)
    # A -1 with errno, as the bindings report it.
    number = re.match(r"(-?\d+) is not a valid OpError", str(error)) if isinstance(error, ValueError) else None
    if number:
        return error_of_code(function, abs(int(number[1])) or 1)
    return CufileError(f"cuFile's {function}: {_words(error)}")


def _words(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
