"""Which tests run where, how long the random ones search, and one random file a test module.

Tests that need what this machine lacks are skipped with the reason. The libcuda for tests can be built anywhere, so
its absence fails where CI=true.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

import files
import gpunvme

if TYPE_CHECKING:
    from collections.abc import Iterator

# A shell that runs the tests in the background has SIGINT ignored, and every program that a test starts inherits that.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

CI = os.environ.get("CI") == "true"
LONG = os.environ.get("GPUNVME_TEST_LEVEL", "short") == "long"

# Examples read files on machines that do other things too: how long one takes says nothing.
settings.register_profile("any", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("short", settings.get_profile("any"), max_examples=50, derandomize=CI)
settings.register_profile("long", settings.get_profile("any"), max_examples=1000)
settings.load_profile("long" if LONG else "short")


def pytest_configure() -> None:
    """Finds the libcuda built from native/fake_cuda for `fake_cuda.use()`, where the Makefile did not name it."""
    if "GPUNVME_FAKE_LIBCUDA" not in os.environ:
        builds = Path(__file__).parent.parent / "build"
        # One that was built with a sanitizer cannot be loaded into an ordinary Python.
        found = [built for built in builds.glob("*/libcuda_fake.so") if built.parent.name not in {"asan", "tsan"}]
        if found:
            os.environ["GPUNVME_FAKE_LIBCUDA"] = str(max(found, key=lambda built: built.stat().st_mtime))
    library = os.environ.get("GPUNVME_FAKE_LIBCUDA", "")
    if not Path(library).is_file() and (CI or library):
        raise pytest.UsageError(f"there is no libcuda for tests at {library or 'build/*/'}: run `make native-plain`")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        reasons = (why_not() for marker, why_not in REQUIREMENTS.items() if item.get_closest_marker(marker))
        for reason in filter(None, reasons):
            item.add_marker(pytest.mark.skip(reason=reason))


@functools.cache
def no_gpu() -> str:
    # In a child process, because CUDA used here would be refused in the children that tests fork.
    program = "import ctypes; c = ctypes.CDLL('libcuda.so.1'); n = ctypes.c_int(); "
    program += "assert c.cuInit(0) == 0 and c.cuDeviceGetCount(ctypes.byref(n)) == 0 and n.value > 0"
    child = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60, check=False)
    return "" if child.returncode == 0 else "no GPU: libcuda.so.1 is absent or finds no device"


def no_torch() -> str:
    return "" if importlib.util.find_spec("torch") else "PyTorch is not installed"


def not_long() -> str:
    return "" if LONG else "slow: runs with GPUNVME_TEST_LEVEL=long (make test-all)"


REQUIREMENTS = {"gpu": no_gpu, "torch": no_torch, "slow": not_long}


# One random file a module, of the module's SIZE: where it is, what is in it, and it opened.


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("module") / "file"


@pytest.fixture(scope="module")
def data(place: Path, request: pytest.FixtureRequest) -> bytes:
    return files.make(place, request.module.SIZE)


@pytest.fixture(scope="module")
def file(place: Path, data: bytes) -> Iterator[gpunvme.File]:
    with gpunvme.open(place) as opened:
        yield opened
