"""What gpunvme leaves on a machine is what `gpunvme config --paths` lists, and all of it.

Whoever removes gpunvme removes what is listed; what is not, stays for ever.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import files
from gpunvme.cli import main
from gpunvme.cli.exits import Exit
from gpunvme.kept_files import kept_files

USE = """
import sys
sys.path[:0] = {path!r}
from pathlib import Path
import gpunvme
from gpunvme.cufile.library import set_log_file
from importlib import import_module
compiling = import_module("gpunvme.gpu.compile")
from gpunvme.paths import measured
measured.keep("here", measured.Record({{"host": measured.Rates(2e9, 1e9)}}, 1 << 20, 1.0))
compiling._fingerprint = lambda *_: "one"
compiling.compile_to_cubin = lambda *_: b"cubin"
compiling._compiled("source", (9, 0), (), "name")
set_log_file()
import os
Path(os.environ["CUFILE_LOGFILE_PATH"]).write_text("log")
with gpunvme.TierManager({{"fast": {tier!r}}}) as tiers:
    tiers.add({file!r}, name="file")
"""


def listed(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    assert main(["config", "--paths"]) == Exit.OK
    return dict(line.split("\t") for line in capsys.readouterr().out.splitlines())


def test_all_that_is_written_is_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    home, tier, data = tmp_path / "home", tmp_path / "tier", tmp_path / "data"
    for folder in (home, tier):
        folder.mkdir()
    data.write_bytes(b"1234")
    code = USE.format(path=[str(files.TESTS)], tier=str(tier), file=str(data))
    for variable in ("XDG_CACHE_HOME", "CUFILE_LOGFILE_PATH", "CUFILE_ENV_PATH_JSON"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("GPUNVME_TIERS", f"fast={tier}")
    done = files.run([sys.executable, "-c", code], timeout=60)
    assert done.returncode == 0, done.stderr
    told = listed(capsys)
    ours = [Path(path) for path in told if path.startswith(str(tmp_path))]
    assert len(ours) == 4
    assert all(path.exists() for path in ours), told
    written = [path for folder in (home, tier) for path in folder.rglob("*") if path.is_file()]
    assert len(written) >= 5
    left = [path for path in written if not any(path.is_relative_to(each) for each in ours)]
    assert left == [tier / "file"]  # which is the user's
    ours[0].unlink()
    assert told[str(ours[0])] + " (not there)" == listed(capsys)[str(ours[0])]


SYSTEM = (
    *("usr/lib/udev/rules.d/60-gpunvme.rules", "etc/udev/rules.d/60-gpunvme.rules", "etc/default/gpunvme-bind"),
    *("usr/lib/systemd/system/gpunvme-bind@.service", "etc/systemd/system/gpunvme-bind@.service"),
    "etc/systemd/system/multi-user.target.wants/gpunvme-bind@0000:01:00.0.service",
    *("usr/src/gpunvme-0.1.0/dkms.conf", "var/lib/dkms/gpunvme/0.1.0/source"),
    "lib/modules/6.1.0-50-amd64/updates/dkms/gpunvme.ko",
)


def test_what_root_installed_is_listed_where_it_is(tmp_path: Path) -> None:
    before = len(kept_files(tmp_path))
    for name in (*SYSTEM, "etc/udev/rules.d/70-others.rules", "lib/modules/6.1.0-50-amd64/updates/dkms/other.ko"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    wants = tmp_path / SYSTEM[5]
    wants.unlink()
    wants.symlink_to("/nowhere")  # the unit is gone, and its link is left
    found = kept_files(tmp_path)[before:]
    assert all(each.there for each in found)
    for name in SYSTEM:
        assert any((tmp_path / name).is_relative_to(each.path) for each in found), name
    assert len(found) == len(SYSTEM)


def test_paths_and_flags_are_two_questions() -> None:
    """Flags for a compiler with a list of files among them would be no flags."""
    assert main(["config", "--paths", "--cflags"]) == Exit.USAGE
