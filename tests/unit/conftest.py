"""One random file a test module, of the module's SIZE: where it is, what is in it, and it opened."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import files
import gpunvme

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


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
