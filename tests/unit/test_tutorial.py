"""What the tutorial tells people to type works, in its order."""

import contextlib
import re
from pathlib import Path

from gpunvme.errors import CommandError

TUTORIAL = Path(__file__).resolve().parents[2] / "docs" / "tutorial.md"


def test_tutorial_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", TUTORIAL.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 6
    names: dict[str, object] = {}
    for block in blocks[:-1]:
        exec(compile(block, str(TUTORIAL), "exec"), names)
    said = capsys.readouterr().out
    assert "64.0 MiB" in said
    assert "by host" in said
    assert "host" in said.splitlines()[-1] or "->" in said
    with contextlib.suppress(CommandError):  # one command in a hundred fails there, which may be one of these
        exec(compile(blocks[-1], str(TUTORIAL), "exec"), names)
    assert "131072 512" in capsys.readouterr().out


def test_tutorial_has_no_other_code():
    """Blocks in other languages would not be run."""
    assert not re.search(r"^```(?!python$|$)", TUTORIAL.read_text(), re.MULTILINE)
