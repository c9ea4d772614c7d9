"""The tests of GPU queues on the emulated GPU, in processes of their own: they need no GPU, and run wherever CI does.

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

_SECONDS = 280  # for each file, on a machine that does other things too
GPU_TESTS = Path(__file__).parent.parent / "gpu"
FILES = ["test_gpu_queues.py", "test_gpu_queue_faults.py", "test_gpu_queue_kernels.py", "test_gpu_queue_processes.py"]
FILES += ["test_gpu_exclusive_queue.py", "test_gpu_several.py", "test_gpu_queue_soak.py", "test_gpu_placements.py"]
FILES += ["test_gpu_cache.py"]
CASES = [
    (file, case)
    for file in FILES
    for case in re.findall(r"^def (test_\w+)", (GPU_TESTS / file).read_text(), re.MULTILINE)
]


@functools.cache
def outcomes(file: str) -> tuple[dict[str, list[ElementTree.Element]], str]:
    """What pytest says of each case, and all that it printed."""
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "report.xml"
        command = [sys.executable, "-X", "faulthandler", "-m", "pytest", "-v", "-p", "no:cacheprovider", "--tb=short"]
        command.append("--capture=sys")  # what libcuda says before it aborts is not to be lost
        environment = {"GPUNVME_FAKE_CUDA_KERNELS": "1"}
        child = files.run([*command, f"--junitxml={report}", GPU_TESTS / file], timeout=_SECONDS, env=environment)
        said = f"ended with {child.returncode}\n{child.stdout}\n{child.stderr}"
        cases: dict[str, list[ElementTree.Element]] = {}
        if report.exists():
            for case in ElementTree.parse(report).iter("testcase"):
                cases.setdefault(case.attrib["name"].partition("[")[0], []).append(case)
        return cases, said


@pytest.mark.timeout(_SECONDS + 10)
@pytest.mark.parametrize(("file", "case"), CASES)
def test_on_the_emulated_gpu(file: str, case: str) -> None:
    if not os.environ.get("GPUNVME_FAKE_LIBCUDA"):
        pytest.skip("no libcuda for tests: run `make native-plain`, or name it in GPUNVME_FAKE_LIBCUDA")
    cases, said = outcomes(file)
    assert case in cases, said
    skipped = [each.find("skipped") for each in cases[case]]
    wrong = [each for each, skip in zip(cases[case], skipped, strict=True) if skip is None and len(each)]
    assert not wrong, "\n".join(ElementTree.tostring(each, "unicode") for each in wrong)
    if all(skip is not None for skip in skipped):
        pytest.skip(next(skip.attrib.get("message", "") for skip in skipped if skip is not None))
