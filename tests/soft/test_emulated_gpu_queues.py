"""The tests of GPU queues on the emulated GPU, in a process of their own: they need no GPU, and run wherever CI does.

If this failed, kernels would do wrong on a GPU what can be seen on none before: the warps are real, only slow.
"""

from __future__ import annotations

import functools
import os
import re
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

import pytest

import files

_SECONDS = 280  # for all of it, on a machine that does other things too
FILES = [Path(__file__).parent.parent / "gpu" / name for name in ("test_gpu_queues.py", "test_gpu_cache.py")]
CASES = [(path, case) for path in FILES for case in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)]


@functools.cache
def outcomes(path: Path) -> tuple[dict[str, list[ElementTree.Element]], str]:
    """What pytest says of each case, and all that it printed."""
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "report.xml"
        command = [sys.executable, "-X", "faulthandler", "-m", "pytest", "-v", "-p", "no:cacheprovider", "--tb=short"]
        command.append("--capture=sys")  # what libcuda says before it aborts is not to be lost
        environment = {"GPUNVME_FAKE_CUDA_KERNELS": "1"}
        child = files.run([*command, f"--junitxml={report}", path], timeout=_SECONDS, env=environment)
        said = f"ended with {child.returncode}\n{child.stdout}\n{child.stderr}"
        cases: dict[str, list[ElementTree.Element]] = {}
        if report.exists():
            for case in ElementTree.parse(report).iter("testcase"):
                cases.setdefault(case.attrib["name"].partition("[")[0], []).append(case)
        return cases, said


@pytest.mark.timeout(_SECONDS + 10)
@pytest.mark.parametrize(("path", "case"), CASES, ids=[case for _, case in CASES])
def test_on_the_emulated_gpu(path: Path, case: str) -> None:
    if not os.environ.get("GPUNVME_FAKE_LIBCUDA"):
        pytest.skip("no libcuda for tests: run `make native-plain`, or name it in GPUNVME_FAKE_LIBCUDA")
    cases, said = outcomes(path)
    assert case in cases, said
    skipped = [each.find("skipped") for each in cases[case]]
    wrong = [each for each, skip in zip(cases[case], skipped, strict=True) if skip is None and len(each)]
    assert not wrong, "\n".join(ElementTree.tostring(each, "unicode") for each in wrong)
    if all(skip is not None for skip in skipped):
        pytest.skip(next(skip.attrib.get("message", "") for skip in skipped if skip is not None))
