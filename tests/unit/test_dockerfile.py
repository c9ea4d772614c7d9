"""contrib/Dockerfile names what there is: files of the project, stages, extras. It is not built here.

A name that is wrong is found by whoever builds the image, minutes into it.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = ROOT / "contrib/Dockerfile"
PAGE = (ROOT / "docs/install.md").read_text()
INSTRUCTIONS = {"FROM", "RUN", "WORKDIR", "COPY", "ENV", "USER", "ENTRYPOINT", "CMD"}


def instructions() -> list[tuple[str, str]]:
    """Its instructions in order, continued lines joined."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in joined.splitlines() if line.strip()]


def stages() -> dict[str, str]:
    """Each stage, and what it is built on, in order."""
    found = {}
    for word, rest in instructions():
        if word == "FROM":
            base, name = re.fullmatch(r"(\S+) AS (\S+)", rest).groups()
            found[name] = base
    return found


def test_only_known_instructions() -> None:
    assert {word for word, _ in instructions()} == INSTRUCTIONS


def test_stages_stand_on_debian_or_on_each_other() -> None:
    known: set[str] = set()
    for name, base in stages().items():
        assert base in known or re.fullmatch(r"debian:[a-z]+-slim", base)
        known.add(name)
    assert len({base for base in stages().values() if base.startswith("debian:")}) == 1  # one Python everywhere
    assert list(stages())[-1] == "cpu"  # what is built where no stage is named


def test_what_is_copied_is_there_and_is_sent() -> None:
    ignored = (ROOT / "contrib/Dockerfile.dockerignore").read_text().splitlines()
    assert ignored[0] == "*"
    for word, rest in instructions():
        if word != "COPY":
            continue
        if match := re.fullmatch(r"--from=(\S+) (\S+) (\S+)", rest):
            assert match[1] in stages()
            # An environment knows its place: commands in it begin with that.
            assert match[2] == match[3] == "/opt/gpunvme"
            continue
        *sources, _target = rest.split()
        for source in sources:
            assert (ROOT / source).exists(), source
            assert f"!{source}" in ignored
    for line in ignored:
        if line.startswith("!"):
            assert (ROOT / line[1:]).exists(), line


def test_build_has_all_that_cmake_reads() -> None:
    """A folder that CMake includes and the image lacks fails the build there only."""
    copied = " ".join(rest for word, rest in instructions() if word == "COPY").split()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {project["readme"], *project["license-files"]} <= set(copied)
    text = (ROOT / "CMakeLists.txt").read_text()
    assert set(re.findall(r"add_subdirectory\((\w+)", text)) <= set(copied)


def test_extras_are_extras_of_ours() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (named,) = re.findall(r"\.whl\)\[([\w,]+)\]", DOCKERFILE.read_text())
    assert set(named.split(",")) <= set(extras)
    assert "with the extras " + " and ".join(named.split(",")) in PAGE


def test_page_builds_stages_that_there_are() -> None:
    targets = re.findall(r"--target (\S+)", PAGE)
    assert targets
    assert set(targets) <= set(stages())
    assert set(re.findall(r"-f (\S+)", PAGE)) >= {"contrib/Dockerfile"}
    for name in set(re.findall(r"\b((?:contrib|kmod|tools)/[\w@.-]+)", PAGE)):
        assert (ROOT / name).exists() or name == "kmod/gpunvme.ko", name
