"""Files, namespaces, layers and GPU memory, on the libcuda for tests: cases that are in modules of their own.

Each module runs in a process of its own: the engine chooses its libcuda once, and CUDA once used is refused in forked
children; other tests want neither.
"""

from __future__ import annotations

import functools
import os
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest

import emulated_gpu_path_cases
import fake_gpu_cases
import fake_gpu_layers
import fake_gpu_path_cases
import files

CASES = [
    pytest.param(module, name, id=name)
    for module in (fake_gpu_cases, fake_gpu_layers, fake_gpu_path_cases, emulated_gpu_path_cases)
    for name in sorted(vars(module))
    if name.startswith("test_")
]


@functools.cache
def outcomes(module: ModuleType) -> tuple[dict[str, list[ElementTree.Element]], str]:
    """What pytest says of each case, and all that it printed."""
    assert module.__file__ is not None
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "report.xml"
        command = [sys.executable, "-X", "faulthandler", "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        child = files.run([*command, f"--junitxml={report}", module.__file__], timeout=110)
        said = f"ended with {child.returncode}\n{child.stdout}\n{child.stderr}"
        cases: dict[str, list[ElementTree.Element]] = {}
        if report.exists():
            for case in ElementTree.parse(report).iter("testcase"):
                cases.setdefault(case.attrib["name"].partition("[")[0], []).append(case)
        return cases, said


@pytest.mark.parametrize(("module", "case"), CASES)
def test_on_the_fake_gpu(module: ModuleType, case: str) -> None:
    if not os.environ.get("GPUNVME_FAKE_LIBCUDA"):
        pytest.skip("no libcuda for tests: run `make native-plain`, or name it in GPUNVME_FAKE_LIBCUDA")
    cases, said = outcomes(module)
    assert case in cases, said
    skipped = [each.find("skipped") for each in cases[case]]
    wrong = [each for each, skip in zip(cases[case], skipped, strict=True) if skip is None and len(each)]
    assert not wrong, "\n".join(ElementTree.tostring(each, "unicode") for each in wrong)
    if all(skip is not None for skip in skipped):
        pytest.skip(next(skip.attrib.get("message", "") for skip in skipped if skip is not None))
