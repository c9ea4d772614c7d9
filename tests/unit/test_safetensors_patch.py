"""patch_safetensors: programs that use the safetensors library load through us, and are left as they were."""

from __future__ import annotations

import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpunvme.errors import FormatError
from gpunvme.models import opening, patch, patch_safetensors, save_file
from gpunvme.models import safetensors as loading

library = pytest.importorskip("safetensors")
library_numpy = pytest.importorskip("safetensors.numpy")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_file({"a": np.arange(6, dtype=np.float32).reshape(2, 3)}, tmp_path / "model.safetensors", {"k": "v"})
    return tmp_path / "model.safetensors"


@pytest.fixture
def user(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module like those of transformers: loaded before the patch, the functions under names of its own."""
    module = types.ModuleType("user_of_safetensors")
    exec("from safetensors import safe_open\nfrom safetensors.numpy import load_file as safe_load_file", vars(module))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def test_every_name_is_replaced_and_put_back(user: Any, path: Path) -> None:
    originals = (library.safe_open, library_numpy.load_file)
    patched = patch_safetensors()
    try:
        assert user.safe_open is library.safe_open is library_numpy.safe_open is not originals[0]
        assert user.safe_load_file is library_numpy.load_file is not originals[1]
        assert issubclass(user.safe_open, opening.safe_open)
        with user.safe_open(str(path), framework="numpy") as file:
            assert isinstance(file, opening.safe_open)
            assert (file.keys(), file.metadata()) == (["a"], {"k": "v"})
            np.testing.assert_array_equal(file.get_slice("a")[1:], [[3, 4, 5]])
        assert user.safe_load_file(path)["a"].shape == (2, 3)
        late = types.ModuleType("late_user_of_safetensors")
        sys.modules[late.__name__] = late
        exec("from safetensors import safe_open\ndef load(f: safe_open | None = None): ...", vars(late))
    finally:
        patched.undo()
    try:
        assert user.safe_open is library.safe_open is library_numpy.safe_open is late.safe_open is originals[0]
        assert user.safe_load_file is library_numpy.load_file is originals[1]
        assert (loading.load_file, opening.safe_open) == (patch.load_file, patch.opening.safe_open)
    finally:
        del sys.modules[late.__name__]


def test_patches_nest_and_end_in_any_order(user: Any) -> None:
    original = user.safe_open
    first, second = patch_safetensors(), patch_safetensors()
    replaced = user.safe_open
    assert replaced is not original
    first.undo()
    first.undo()
    assert user.safe_open is replaced
    with patch_safetensors():
        second.undo()
        assert user.safe_open is replaced
    assert user.safe_open is original


def test_an_error_ends_the_patch(user: Any) -> None:
    original = user.safe_open
    with pytest.raises(RuntimeError, match="stop"), patch_safetensors():
        raise RuntimeError("stop")
    assert user.safe_open is original


def test_what_somebody_else_put_there_is_left_alone(user: Any) -> None:
    mine = object()
    with patch_safetensors():
        user.safe_open = mine
    assert user.safe_open is mine


def test_errors_are_what_callers_of_either_library_catch(user: Any, path: Path) -> None:
    with patch_safetensors():
        with pytest.raises(FileNotFoundError):
            user.safe_load_file(path.parent / "none")
        with pytest.raises(FileNotFoundError):
            user.safe_open(path.parent / "none", "np")
        with user.safe_open(path, "np") as file, pytest.raises(library.SafetensorError, match="lm_head"):
            file.get_tensor("lm_head")
        with pytest.raises(library.SafetensorError, match="closed"):
            file.keys()
        path.write_bytes(b"\xff" * 20)
        for load in (user.safe_load_file, lambda name: user.safe_open(name, "np")):
            with pytest.raises(library.SafetensorError) as caught:
                load(path)
            assert isinstance(caught.value, FormatError)
            assert (caught.value.filename, caught.value.offset) == (str(path), 0)
            assert str(path) in str(caught.value)


def test_what_we_cannot_load_goes_on_to_the_library(user: Any, path: Path) -> None:
    original = user.safe_open
    with patch_safetensors():
        with user.safe_open(path, framework="flax") as file:
            assert isinstance(file, original)
        with pytest.raises(library.SafetensorError, match="framework"):
            user.safe_open(path, framework="nonsense")
        with pytest.raises(library.SafetensorError, match="Device"):
            user.safe_open(path, framework="np", device="cuda")


def test_options_of_newer_versions_are_taken(user: Any, path: Path) -> None:
    with patch_safetensors():
        assert user.safe_load_file(path, backend="pread")["a"].shape == (2, 3)
        with user.safe_open(path, framework="np", device=None, backend="mmap") as file:
            assert file.get_tensor("a").shape == (2, 3)


@pytest.mark.torch
def test_torch_functions(path: Path) -> None:
    torch = pytest.importorskip("torch")
    module = pytest.importorskip("safetensors.torch")
    expected, original = module.load_file(path), module.load_file
    with patch_safetensors():
        assert module.load_file is not original
        found = module.load_file(path, device=torch.device("cpu"))
        assert torch.equal(found["a"], expected["a"])
        assert found["a"].untyped_storage().nbytes() == 24
        model = torch.nn.Module()
        model.a = torch.nn.Parameter(torch.zeros(2, 3))
        module.load_model(model, path)  # through the module's own name
        assert torch.equal(model.a.detach(), expected["a"])
        if not torch.cuda.is_available():
            with pytest.raises((RuntimeError, AssertionError), match="CUDA"):
                module.load_file(path, device="cuda:0")
    assert module.load_file is original


def test_without_the_library_there_is_nothing_to_patch() -> None:
    program = (
        "import sys\nsys.modules['safetensors'] = None\nfrom gpunvme.models import patch_safetensors\n"
        "try:\n    patch_safetensors()\nexcept ImportError:\n    sys.exit(0)\nsys.exit(1)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
