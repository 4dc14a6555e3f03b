"""A slice of the attack of ``scripts/attack_crashes.py``, a disk that is really full, and another user."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import traceback
from pathlib import Path

import pytest

from cmt_edge.deploy.errors import OutputError
from helpers.bundles import make_bundle, snapshot
from helpers.crashes import Attack, exports
from helpers.faults import Fault, compiler
from helpers.paths import ROOT

NOBODY = 65534
"""The number of the user that owns nothing."""

SLICE = {
    "predict": [Fault("open", number, error) for number in (5, 7) for error in ("EIO", "EACCES")],
    "export fp32": [
        Fault("rename", 3, "SIGKILL"),
        Fault("rename", 3, "EIO"),
        Fault("write", 9, "ENOSPC", lasting=True),
    ],
}
"""Faults of scenarios: those around the moments in which a bundle appears, and in which it is read."""

FILL = """
import sys
from pathlib import Path
from cmt_edge.deploy.errors import OutputError
from helpers.bundles import make_bundle
target = Path(sys.argv[1]) / "tiny"
old = make_bundle(target)
try:
    make_bundle(target, members={"model.bin": bytes(8 << 20)})
except (OutputError, OSError) as exc:
    print(type(exc).__name__, exc)
from cmt_edge.deploy import Bundle
assert Bundle.open(target).manifest.files == old.manifest.files
assert [path.name for path in target.parent.iterdir()] == ["tiny"]
"""
"""Writes a bundle to a small disk, then one that does not fit."""


@pytest.mark.slow
@pytest.mark.skipif(compiler() is None, reason="needs gcc on Linux, which builds the library of faults")
def test_a_slice_of_all_faults(onnx_bundle, tmp_path):
    scenarios = exports(onnx_bundle, onnx_bundle.golden().sources[0])
    with Attack(tmp_path) as attack:
        for name, faults in SLICE.items():
            outcomes = [attack.attempt(scenarios[name], fault) for fault in faults]
            assert [(str(o.fault), o.call, o.complaint) for o in outcomes if o.complaint] == []
            assert any(outcome.code not in (0, -9) for outcome in outcomes), "no fault was noticed"


def test_a_disk_that_is_full(tmp_path):
    """A real one: a file system in memory of four megabytes."""
    unshare = shutil.which("unshare")
    mounting = f"mount -t tmpfs -o size=4m none {tmp_path} && exec "
    command = [unshare or "", "--mount", "sh", "-c"]
    if unshare is None or subprocess.run([*command, mounting + "true"], check=False).returncode:
        pytest.skip("this machine permits no mount namespaces")
    done = subprocess.run(
        [*command, mounting + '"$@"', "sh", sys.executable, "-c", FILL, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT / 'tests'}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "No space left" in done.stdout


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can become another user"
)
@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize("mode", [0o755, 0o700])
def test_another_user_cannot_write_and_is_told_so(tmp_path, existing, mode):
    """Whether the folder may be entered or not."""
    place = tmp_path / "place"
    place.mkdir()
    if existing:
        make_bundle(place / "tiny")
    tmp_path.chmod(0o755)
    place.chmod(mode)
    before = snapshot(place)
    child = os.fork()
    if child == 0:
        os._exit(_as_nobody(place))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert snapshot(place) == before
    assert [path.name for path in place.iterdir()] == (["tiny"] if existing else [])


def _as_nobody(place: Path) -> int:
    """Write a bundle as another user; 0 if that was refused with a typed error."""
    try:
        os.setuid(NOBODY)
        make_bundle(place / "tiny")
    except OutputError as exc:
        return 0 if "Permission denied" in str(exc) and exc.remedy else 1
    except BaseException:
        traceback.print_exc()
        return 2
    return 3
