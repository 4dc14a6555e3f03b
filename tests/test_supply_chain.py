"""Pins with hashes, licences, the bill of materials, and a build that gives the same bytes each time."""

from __future__ import annotations

import io
import json
import re
import sys
import tarfile
import zipfile
from importlib import import_module
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path

import pytest

pytest.importorskip("tomllib", reason="needs Python 3.11, which reads TOML")
pytest.importorskip("packaging", reason="needs packaging, which reads requirements")

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("build_release", "licences", "lock", "resolved", "sbom")
BSD3 = "BSD-3-Clause"
HASH = "0" * 64
TEXTS = {
    BSD3: r"(?i)neither the name of",
    "Apache-2.0": r"Apache License\s+Version 2\.0",
    "LicenseRef-Matplotlib": r"matplotlib",
}
"""SPDX identifier -> what the text of the licence contains."""


@pytest.fixture
def script(monkeypatch):
    """A function that imports a file of ``scripts/``, whose files import each other."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    yield import_module
    for name in SCRIPTS:
        sys.modules.pop(name, None)


@pytest.fixture
def package(script):
    """A function that makes a package from its metadata."""

    def make(name: str, version: str = "1.0", **metadata: object):
        return script("resolved").Package({"name": name, "version": version, **metadata}, HASH)

    return make


def read_installed(name: str):
    """A distribution of this environment, or None."""
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None


# Pins with hashes


def test_every_pin_but_that_of_torch_is_locked(script):
    lock = script("lock")
    constraints, locked = lock.CONSTRAINTS.read_text(), lock.LOCKED.read_text()
    assert lock.find_faults(constraints, locked) == []
    assert "torch" in lock.read_pins(constraints)
    assert "torch" not in lock.read_pins(locked)
    assert len(lock.read_pins(locked)) > 50
    assert lock.main(["--check"]) == 0


@pytest.mark.parametrize(("names", "locked"), [("TOOLS", "LOCKED_TOOLS"), ("PAGES", "LOCKED_PAGES")])
def test_the_tools_are_locked(script, names, locked):
    lock = script("lock")
    names = re.findall(r"^[\w-]+", getattr(lock, names).read_text(), re.MULTILINE)
    hashes = lock.read_hashes(getattr(lock, locked).read_text())
    assert names
    assert set(names) <= hashes.keys()
    assert all(hashes.values())


@pytest.mark.parametrize(
    ("locked", "fault"),
    [
        (f"some-pkg==1.0 \\\n    --hash=sha256:{HASH}\n", ""),
        (f"some-pkg==1.1 \\\n    --hash=sha256:{HASH}\n", "some-pkg is pinned at 1.0, but locked at 1.1."),
        ("some-pkg==1.0\n", "some-pkg has no hash."),
        ("", "some-pkg is pinned, but it is not locked."),
        (
            f"some-pkg==1.0 --hash=sha256:{HASH}\nb==2 --hash=sha256:{HASH}\n",
            "b is locked, but it is not pinned.",
        ),
        (f"b==2 \\\n    --hash=sha256:{HASH}\nsome-pkg==1.0\n", "some-pkg has no hash."),
        (f"some-pkg==1.0 --hash=sha256:{HASH}\ntorch==2.0\n", "torch is locked, but it is not pinned."),
    ],
)
def test_a_difference_between_pins_and_hashes_is_found(script, locked, fault):
    faults = script("lock").find_faults("# pins\nSome_Pkg==1.0\ntorch==2.0\n", locked)
    assert faults == [] if not fault else fault in faults


def test_a_file_that_does_not_fit_the_pins_is_a_failure(script, monkeypatch, tmp_path, capsys):
    lock = script("lock")
    monkeypatch.setattr(lock, "LOCKED", tmp_path / "locked.txt")
    lock.LOCKED.write_text(f"numpy==0.1 --hash=sha256:{HASH}\n")
    assert lock.main(["--check"]) == 1
    assert "numpy is pinned at" in capsys.readouterr().err


def test_all_that_the_tests_need_is_locked(script):
    """torch is left out with its requirements: they differ between its CPU and CUDA builds."""
    lock, resolved = script("lock"), script("resolved")
    locked = lock.read_pins(lock.LOCKED.read_text())
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    project = import_module("tomllib").loads(text)["project"]
    extras = project["optional-dependencies"]
    own = {
        *script("licences").PROPRIETARY,
        "tensorrt",
        "tensorrt-cu12",
        "completion",
        "kserve",
        "loadgen",
    }
    waiting = {entry for name in extras if name not in own for entry in extras[name]}
    waiting |= set(project["dependencies"])
    names = {re.match(r"[\w.-]+", entry)[0].lower() for entry in waiting if "python_version" not in entry}
    seen = {"cmt-edge", "torch"}
    while left := {lock.normalize(name) for name in names} - seen:
        seen |= left
        installed = filter(None, map(read_installed, left))
        found = [resolved.Package(each.metadata.json) for each in installed]
        names = {name for each in found for name in resolved.find_required(each)}
    assert seen - {"cmt-edge", "torch"} - locked.keys() == set()


# Licences


@pytest.mark.parametrize(
    ("metadata", "licence"),
    [
        ({"license_expression": "MIT AND Zlib", "license": "other"}, "MIT AND Zlib"),
        ({"license": "MIT License\n\nPermission is granted"}, "MIT"),
        ({"license": "Apache 2.0"}, "Apache-2.0"),
        ({"license": "GPLv3"}, "GPLv3"),
        ({"license": "GPLv3", "classifier": ["License :: OSI Approved :: MIT License"]}, "GPLv3"),
        ({"classifier": ["Topic :: Other", "License :: OSI Approved :: MIT License"]}, "MIT"),
        ({"classifier": ["License :: OSI Approved :: BSD License"]}, ""),
        ({"license": "All rights reserved\nby somebody"}, ""),
        ({"name": "SciPy", "license": "BSD"}, BSD3),
        ({"name": "SciPy", "license_expression": "GPL-3.0-only"}, "GPL-3.0-only"),
        ({}, ""),
    ],
)
def test_a_licence_is_read_from_the_metadata(script, metadata, licence):
    assert script("licences").find_licence({"name": "some-package", **metadata}) == licence


@pytest.mark.parametrize(
    ("expression", "refused"),
    [
        ("MIT", []),
        ("MIT AND (Apache-2.0 OR BSD-2-Clause)", []),
        ("Apache-2.0 WITH LLVM-exception", []),
        ("MIT OR GPL-2.0-only", ["GPL-2.0-only"]),
        ("LGPL-2.1-or-later AND (MIT OR AGPL-3.0-only)", ["AGPL-3.0-only", "LGPL-2.1-or-later"]),
        ("GPL-3.0-or-later WITH GCC-exception-3.1", ["GPL-3.0-or-later WITH GCC-exception-3.1"]),
        ("LicenseRef-NVIDIA-Proprietary", ["LicenseRef-NVIDIA-Proprietary"]),
    ],
)
def test_what_is_not_permitted_is_named(script, expression, refused):
    licences = script("licences")
    assert licences.find_refused(expression, licences.PERMITTED) == refused


def test_unknown_and_refused_licences_are_faults(script, package):
    packages = [
        package("good", license_expression="MIT"),
        package("silent"),
        package("viral", license_expression="GPL-3.0-only"),
        package("lesser", license_expression="LGPL-2.1-or-later"),
    ]
    libraries = {"numpy": {"libquadmath", "libgfortran"}, "good": {"libsecret"}}
    faults = script("licences").find_faults(packages, libraries)
    assert faults == [
        "The licence of silent 1.0 is unknown.",
        "viral 1.0 has a licence that is not permitted: ['GPL-3.0-only'].",
        "lesser 1.0 has a licence that is not permitted: ['LGPL-2.1-or-later'].",
        "The licence of libsecret, which good brings along, is unknown.",
    ]


def test_a_fault_writes_no_page(script, package, monkeypatch, tmp_path, capsys):
    licences = script("licences")
    monkeypatch.setattr(licences, "PAGE", tmp_path / "licences.md")
    monkeypatch.setattr(licences, "ROOT", tmp_path)
    monkeypatch.setattr(licences, "read_extras", lambda: ["export"])
    monkeypatch.setattr(licences, "find_libraries", lambda _: {"numpy": {"libgfortran"}})
    monkeypatch.setattr(licences, "resolve", lambda _: [package("cmt-edge"), package("silent")])
    assert licences.main([]) == 1
    assert capsys.readouterr().err == "The licence of silent 1.0 is unknown.\n"
    assert not licences.PAGE.exists()
    good = package("Good", "1.2+cpu", license="MIT", home_page="https://good.example")
    monkeypatch.setattr(licences, "resolve", lambda extra: [good] if extra else [])
    assert licences.main([]) == 0
    assert "| Good 1.2 | MIT | `export` | <https://good.example> |" in licences.PAGE.read_text()


@pytest.mark.parametrize(
    ("name", "library"),
    [
        ("libgomp-e985bcbb.so.1.0.0", "libgomp"),
        ("libgomp.so.1", "libgomp"),
        ("libquadmath-96973f99-934c22de.so.0.0.0", "libquadmath"),
        ("libscipy_openblas64_-32a4b2a6.so", "libscipy_openblas64_"),
        ("libtbbbind_2_5.so.3", "libtbbbind_2_5"),
        ("libstdc++.so.6", "libstdc++"),
        ("_core.cpython-311-x86_64-linux-gnu.so", None),
        ("lib.cpython-311-x86_64-linux-gnu.so", None),
        ("libname.py", None),
    ],
)
def test_names_of_libraries(script, name, library):
    match = script("licences").LIBRARY.match(name)
    assert (match and match[1]) == library


def test_libraries_of_others_are_found_in_wheels(script, tmp_path):
    site = tmp_path / "lib" / "python3.11" / "site-packages" / "some_pkg-1.0.dist-info"
    site.mkdir(parents=True)
    (site / "METADATA").write_text("Metadata-Version: 2.1\nName: Some_Pkg\nVersion: 1.0\n")
    names = ("some_pkg.libs/libgomp-e985bcbb.so.1", "torch/lib/libtorch_cpu.so", "some_pkg/core.so")
    (site / "RECORD").write_text("".join(f"{name},,\n" for name in names))
    assert script("licences").find_libraries(tmp_path) == {"some-pkg": {"libgomp"}}
    assert script("licences").find_libraries(tmp_path / "lib") == {}


def test_the_page_has_every_pin(script):
    lock, licences = script("lock"), script("licences")
    rows = re.findall(r"^\| (\S+) (\S+) \| ([^|]+) \|", licences.PAGE.read_text(), re.MULTILINE)
    listed = {lock.normalize(name): version for name, version, _ in rows}
    pins = lock.read_pins(lock.CONSTRAINTS.read_text())
    assert pins.items() <= listed.items(), "constraints.txt changed: make supply"
    assert all(licences.find_refused(licence.strip(), licences.PERMITTED) == [] for *_, licence in rows)


def test_the_page_says_what_the_installed_packages_say(script):
    licences, resolved = script("licences"), script("resolved")
    rows = re.findall(r"^\| (\S+) (\S+) \| ([^|]+) \|", licences.PAGE.read_text(), re.MULTILINE)
    compared = 0
    for name, version, licence in rows:
        installed = read_installed(name)
        if installed and resolved.Package(installed.metadata.json).public_version == version:
            assert licences.find_licence(installed.metadata.json) == licence.strip(), name
            compared += 1
    if not compared:
        pytest.skip("no package is installed at the version of the page")


def test_licences_that_we_read_are_those_of_the_wheels(script):
    compared = 0
    for name, licence in script("licences").READ.items():
        installed = read_installed(name)
        paths = [path for path in (installed and installed.files) or [] if "LICENSE" in path.name]
        texts = [path.locate().read_text(encoding="utf-8", errors="replace") for path in paths]
        if texts:
            assert any(re.search(TEXTS[licence], text) for text in texts), name
            compared += 1
    assert compared or find_spec("sympy") is None


# What pip resolves


def test_a_report_of_pip_is_read(script):
    entry = {
        "metadata": {"name": "torch", "version": "2.13.0+cpu", "project_url": ["Docs, D", "Source, S"]},
        "download_info": {"url": "u", "archive_info": {"hashes": {"sha256": HASH}}},
    }
    local = {"metadata": {"name": "Cmt_Edge", "version": "1"}, "download_info": {"url": "u", "dir_info": {}}}
    first, second = script("resolved").read_report({"install": [entry, local]})
    assert (first.key, first.sha256, first.link) == ("cmt-edge", "", "")
    assert (second.public_version, second.sha256, second.link) == ("2.13.0", HASH, "S")


def test_requirements_follow_markers_and_extras(script, package):
    project = package(
        "cmt-edge",
        requires_dist=[
            "numpy>=1",
            "old; python_version < '3'",
            "torch; extra == 'export'",
            "cmt-edge[export]; extra == 'all'",
            "pytest; extra == 'test'",
        ],
    )
    resolved = script("resolved")
    assert resolved.find_required(project) == {"numpy"}
    assert resolved.find_required(project, ["all"]) == {"numpy", "torch"}
    torch = package("torch", requires_dist=["SymPy"])
    everything = [project, torch, package("numpy"), package("sympy"), package("stray")]
    assert resolved.find_unreached(everything, "all") == ["stray"]
    assert resolved.find_unreached(everything, "") == ["stray", "sympy", "torch"]


# The bill of materials


def test_a_bill_is_valid_and_the_same_each_time(script, package, monkeypatch, tmp_path, capsys):
    pytest.importorskip("cyclonedx", reason="needs the tools of make supply")
    sbom = script("sbom")
    project = package("cmt-edge", license_expression="Apache-2.0", requires_dist=["b>=1", "a"])
    packages = [
        package("a", license_expression="MIT OR Zlib"),
        package("b", home_page="https://b.example"),
        project,
    ]
    monkeypatch.setattr(sbom, "resolve", lambda _: packages)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    assert sbom.main([str(tmp_path / "new" / "bill.json")]) == 0
    assert "valid; 3 components, 3 with a hash" in capsys.readouterr().out
    text = (tmp_path / "new" / "bill.json").read_text()
    bill = json.loads(text)
    assert [component["name"] for component in bill["components"]] == ["a", "b"]
    assert bill["components"][0]["licenses"] == [{"expression": "MIT OR Zlib"}]
    assert bill["metadata"]["timestamp"] == "2023-11-14T22:13:20+00:00"
    packages.reverse()
    assert sbom.main([str(tmp_path / "again.json")]) == 0
    assert (tmp_path / "again.json").read_text() == text
    packages.append(package("stray"))
    assert sbom.main([str(tmp_path / "stray.json")]) == 1
    assert "Nothing requires these packages: stray" in capsys.readouterr().err
    packages[-1] = package("c", license_expression="MIT", version="2")
    project.metadata["requires_dist"].append("c")
    assert sbom.main([str(tmp_path / "other.json")]) == 0
    assert json.loads((tmp_path / "other.json").read_text())["serialNumber"] != bill["serialNumber"]


# The build


def pack(path: Path, members: dict[str, bytes], **attributes: object) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            for key, value in attributes.items():
                setattr(member, key, value)
            archive.addfile(member, io.BytesIO(data))
    return path


def test_a_source_distribution_keeps_nothing_of_the_machine(script, tmp_path):
    rewrite = script("build_release").rewrite_sdist
    members = {"p/a.py": b"a = 1\n", "p/b.py": b"b = 2\n"}
    first = pack(tmp_path / "1.tar.gz", members, mtime=1.5, uname="ann", uid=1000, mode=0o600)
    reverse = dict(reversed(members.items()))
    second = pack(tmp_path / "2.tar.gz", reverse, mtime=9.5, gname="staff", gid=7, mode=0o664)
    changed = pack(tmp_path / "3.tar.gz", members | {"p/b.py": b"b = 3\n"}, mode=0o644)
    runnable = pack(tmp_path / "4.tar.gz", members, mode=0o755)
    for path in (first, second, changed, runnable):
        rewrite(path, 1_700_000_000)
    assert first.read_bytes() == second.read_bytes()
    assert len({path.read_bytes() for path in (first, changed, runnable)}) == 3
    with tarfile.open(first) as archive:
        assert [archive.extractfile(member).read() for member in archive] == list(members.values())


def test_different_builds_are_a_failure(script, monkeypatch, tmp_path, capsys):
    release = script("build_release")

    def build(commit: str, place, folder: Path) -> list[Path]:
        path = folder / place.folder.replace("/", "-")
        path.mkdir()
        (path / "made.whl").write_text(place.zone)
        return [path / "made.whl"]

    monkeypatch.setattr(release, "build", build)
    monkeypatch.setattr(release, "run", lambda *_, **__: "commit")
    assert release.main(["--twice", str(tmp_path / "out")]) == 1
    assert "The two builds differ" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert release.main([str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "made.whl").read_text() == "UTC"


@pytest.mark.slow
@pytest.mark.skipif(find_spec("setuptools") is None, reason="needs setuptools, which builds the wheel")
@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs a checkout of Git")
def test_two_builds_of_a_commit_are_equal(script, tmp_path, capsys):
    assert script("build_release").main(["--twice", str(tmp_path / "out")]) == 0
    assert "equal, bit for bit" in capsys.readouterr().out
    wheel, source = sorted((tmp_path / "out").iterdir(), key=lambda path: path.suffix, reverse=True)
    assert "cmt_edge/cmt/__init__.py" in zipfile.ZipFile(wheel).namelist()
    with tarfile.open(source) as archive:
        assert any(name.endswith("/pyproject.toml") for name in archive.getnames())
