"""What `import gpunvme` costs: NumPy, the engine and nothing else. Command-line tools and forks pay for the rest."""

from __future__ import annotations

import json
import sys

import files

LOADED = """
import json, sys
import numpy
before = set(sys.modules)
import gpunvme
{use}
mapped = sorted({{line.split()[-1] for line in open("/proc/self/maps") if "/" in line}})
print(json.dumps([sorted(set(sys.modules) - before), mapped]))
"""

OURS = {
    "gpunvme",
    "gpunvme._native",
    "gpunvme.arguments",
    "gpunvme.errors",
    "gpunvme.file",
    "gpunvme.freeing",
    "gpunvme.many",
    "gpunvme.memory",
    "gpunvme.opening",
    "gpunvme.p2pdma",
    "gpunvme.p2pdma.mappings",
    "gpunvme.paths",
    "gpunvme.paths.base",
    "gpunvme.paths.choose",
    "gpunvme.paths.cufile",
    "gpunvme.paths.gpu_nvme",
    "gpunvme.paths.host",
    "gpunvme.paths.nvme",
    "gpunvme.paths.p2pdma",
    "gpunvme.replace",
    "gpunvme.streams",
    "gpunvme.totals",
    "gpunvme.transfer",
}
NOT_WANTED = {
    "asyncio",
    "ssl",
    "torch",
    "rich",
    "typer",
    "click",
    "cupy",
    "safetensors",
    "matplotlib",
    "numpy.testing",
    "hypothesis",
}


def loaded(use: str = "") -> tuple[set[str], list[str]]:
    modules, mapped = json.loads(files.output(LOADED.format(use=use)))
    return set(modules), mapped


def test_importing_loads_little() -> None:
    modules, mapped = loaded()
    assert {module for module in modules if module.split(".")[0] == "gpunvme"} == OURS
    assert not {module for module in modules if module in NOT_WANTED or module.split(".")[0] in NOT_WANTED}
    assert not [library for library in mapped if "cuda" in library.rsplit("/", 1)[-1].lower()]
    others = {module.split(".")[0] for module in modules} - {"gpunvme"}
    assert others - set(sys.stdlib_module_names) <= {"numpy"}  # more of it than `import numpy` loads


def test_host_files_need_neither_cuda_nor_torch() -> None:
    modules, mapped = loaded("with gpunvme.open('/proc/self/exe') as f: f.read(); f.explain(); f.gather([1], 9)")
    assert not modules & NOT_WANTED
    assert not [library for library in mapped if "cuda" in library.rsplit("/", 1)[-1].lower()]


def test_every_public_name_is_there() -> None:
    program = "import gpunvme; print([name for name in gpunvme.__all__ if getattr(gpunvme, name, None) is None])"
    assert files.output(program) == "[]\n"
    assert files.output("import gpunvme; print(sorted(gpunvme.__all__) == gpunvme.__all__)") == "True\n"


def test_names_that_are_not_there() -> None:
    assert "has no attribute 'nothing'" in files.python("import gpunvme; gpunvme.nothing").stderr


def test_pytorch_keeps_its_name_and_is_asked_for_clearly() -> None:
    """Whoever imports everything must not get ours for PyTorch's."""
    assert files.output("import gpunvme; from gpunvme import *; print('torch' in globals())") == "False\n"
    program = "import sys; sys.modules['torch'] = None; import gpunvme; gpunvme.torch"
    assert "pip install gpunvme[torch]" in files.python(program).stderr
