"""Test cases that need a process of their own, run there by a pytest of their own, once for all of a module."""

from __future__ import annotations

import functools
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

import pytest

import files


@functools.cache
def outcomes(module: str) -> tuple[dict[str, list[ElementTree.Element]], str]:
    """What pytest says of each case of a file, and all that it printed."""
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "report.xml"
        command = [sys.executable, "-X", "faulthandler", "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        environment = {"XDG_CACHE_HOME": directory}
        child = files.run([*command, f"--junitxml={report}", module], timeout=110, env=environment)
        said = f"ended with {child.returncode}\n{child.stdout}\n{child.stderr}"
        cases: dict[str, list[ElementTree.Element]] = {}
        if report.exists():
            for case in ElementTree.parse(report).iter("testcase"):
                cases.setdefault(case.attrib["name"].partition("[")[0], []).append(case)
        return cases, said


def check(module: str, case: str) -> None:
    """Pass, fail or skip as the case did there."""
    cases, said = outcomes(module)
    assert case in cases, said
    skipped = [each.find("skipped") for each in cases[case]]
    wrong = [each for each, skip in zip(cases[case], skipped, strict=True) if skip is None and len(each)]
    assert not wrong, "\n".join(ElementTree.tostring(each, "unicode") for each in wrong)
    if all(skip is not None for skip in skipped):
        pytest.skip(next(skip.attrib.get("message", "") for skip in skipped if skip is not None))
