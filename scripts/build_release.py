"""Build the wheel and the source distribution of a commit, bit for bit the same each time.

usage: python scripts/build_release.py [--commit COMMIT] [--twice] FOLDER

Only files that Git has are built: the commit (``HEAD``) is cloned into a temporary folder. Times in the
archives are the time of the commit, modes are 0644 and 0755, owners are 0. The build runs in this
environment, without an index; the same Python, setuptools and zlib give the same bytes. ``--twice`` builds
again from a second clone, in another folder, in another time zone and with another umask, and compares. The
exit code is 1 if the bytes differ.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
"""The checkout."""

TIME_LIMIT_S = 300
"""The time that one command may take, in seconds."""

BUILD = """
import os, sys
import setuptools.build_meta as backend
os.umask(0o022)
target = sys.argv[1]
for kind in ("sdist", "wheel"):
    getattr(backend, "build_" + kind)(target)
"""
"""Builds both archives of the current folder into the folder of the argument, which setuptools overwrites."""

ENDINGS = (".tar.gz", ".whl")
"""Ends of the names of the two archives, in the order of their names."""

EARLIEST = 315_532_800
"""The first second of 1980, from which on a ZIP archive can hold times; seconds since 1970."""


@dataclass(frozen=True)
class Surroundings:
    """What may differ between two builds: the clone's folder, the time zone and the umask."""

    folder: str
    zone: str
    umask: int


PLACES = (Surroundings("first", "UTC", 0o022), Surroundings("elsewhere/second", "Asia/Tokyo", 0o077))
"""Where the archives are built, and where they are built again."""


def run(*command: str, cwd: Path, **variables: str) -> str:
    """The output of a command; stops the script if it fails."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        command,
        cwd=cwd,
        env=environment | variables,
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT_S,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"error: {' '.join(command[:3])} failed\n{done.stdout[-1000:]}{done.stderr[-3000:]}")
    return done.stdout


def choose_mode(is_folder: bool, mode: int) -> int:
    """The mode in the archives, which says only whether the owner may execute the file."""
    return 0o755 if is_folder or mode & 0o100 else 0o644


def rewrite_sdist(archive: Path, seconds: int) -> None:
    """Write a source distribution again, with nothing of the machine and the moment in it.

    setuptools puts in the times of the files, the user's name and the time of the compression. Here the
    members are sorted, ``seconds`` since 1970 is the time of all, and the owner is 0.
    """
    with tarfile.open(archive) as source:
        members = [(member, source.extractfile(member)) for member in source.getmembers()]
        contents = {member.name: (member, data.read() if data else b"") for member, data in members}
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w", format=tarfile.PAX_FORMAT) as target:
        for name in sorted(contents):
            member, data = contents[name]
            clean = tarfile.TarInfo(name)
            clean.type, clean.linkname, clean.size = member.type, member.linkname, len(data)
            clean.mtime = seconds
            clean.mode = choose_mode(member.isdir(), member.mode)
            target.addfile(clean, io.BytesIO(data))
    archive.write_bytes(gzip.compress(plain.getvalue(), mtime=seconds))


def build(commit: str, place: Surroundings, folder: Path) -> list[Path]:
    """The archives of a commit, made in a new clone below ``folder``: source distribution, wheel."""
    sources, made = folder / place.folder / "sources", folder / place.folder / "made"
    made.mkdir(parents=True)
    previous = os.umask(place.umask)
    try:
        run("git", "clone", "--quiet", "--no-checkout", str(ROOT), str(sources), cwd=folder)
        run("git", "checkout", "--quiet", "--detach", commit, cwd=sources)
    finally:
        os.umask(previous)
    for path in sources.rglob("*"):
        if not path.is_symlink() and ".git" not in path.relative_to(sources).parts:
            path.chmod(choose_mode(path.is_dir(), path.stat().st_mode))
    seconds = max(int(run("git", "log", "-1", "--format=%ct", cwd=sources)), EARLIEST)
    times = {"SOURCE_DATE_EPOCH": str(seconds), "TZ": place.zone}
    run(sys.executable, "-c", BUILD, str(made), cwd=sources, **times)
    names = [path.name for path in made.iterdir()]
    if len(names) != len(ENDINGS) or not all(any(n.endswith(end) for n in names) for end in ENDINGS):
        raise SystemExit(f"error: the build made {names}, and not one wheel and one source distribution")
    archives = sorted(made.iterdir(), key=lambda path: path.suffix)
    rewrite_sdist(archives[0], seconds)
    return archives


def read_digest(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main(arguments: list[str] | None = None) -> int:
    """Build once or twice, copy the archives to the folder and print their hashes; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where the archives go")
    parser.add_argument("--commit", default="HEAD", help="what is built (default: HEAD)")
    parser.add_argument("--twice", action="store_true", help="build again elsewhere, and compare")
    options = parser.parse_args(arguments)
    commit = run("git", "rev-parse", "--verify", f"{options.commit}^{{commit}}", cwd=ROOT).strip()
    with tempfile.TemporaryDirectory() as name:
        places = PLACES if options.twice else PLACES[:1]
        builds = [build(commit, place, Path(name)) for place in places]
        digests = [{path.name: read_digest(path) for path in archives} for archives in builds]
        if any(other != digests[0] for other in digests[1:]):
            print("The two builds differ:", *digests, sep="\n", file=sys.stderr)
            return 1
        options.folder.mkdir(parents=True, exist_ok=True)
        for path in builds[0]:
            shutil.copyfile(path, options.folder / path.name)
    for path, digest in digests[0].items():
        print(f"{digest}  {path}")
    if options.twice:
        print(f"both builds of {commit[:12]} are equal, bit for bit")
    return 0


if __name__ == "__main__":
    sys.exit(main())
