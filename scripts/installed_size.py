"""Installs the wheel with an extra into an empty environment, and prints the size of each package.

    python scripts/installed_size.py [EXTRA ...]

Versions are those of ``constraints.txt``. Without an argument the extra is ``openvino``, what the image of
``examples/container`` installs. Sizes are those of the files on the disk, without compiled Python files and
without pip.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import venv
from importlib.metadata import Distribution, distributions
from pathlib import Path

from try_wheel import ROOT, build_wheel, require, run

from cmt_edge.deploy.report import format_table

LEFT_OUT = ("pip", "setuptools")
"""Packages that a new environment has by itself."""

MEBIBYTE = 1 << 20
"""Bytes."""

SMALLEST = 0.5
"""Mebibytes from which a package has a row of its own."""


def measure(package: Distribution) -> int:
    """Bytes of the files that a package has installed, without compiled Python files."""
    paths = [Path(str(file.locate())) for file in package.files or [] if file.suffix != ".pyc"]
    return sum(path.stat().st_size for path in paths if path.is_file())


def measure_packages(site: Path) -> dict[str, int]:
    """Name and version -> bytes, the largest first."""
    found = {
        f"{package.metadata['Name']} {package.version}": measure(package)
        for package in distributions(path=[str(site)])
        if package.metadata["Name"] not in LEFT_OUT
    }
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def make_table(sizes: dict[str, int]) -> str:
    """The packages from :data:`SMALLEST` on, the others together, and the sum."""
    large = {name: size for name, size in sizes.items() if size >= SMALLEST * MEBIBYTE}
    rest = [size for name, size in sizes.items() if name not in large]
    rows = [*large.items(), *([(f"{len(rest)} others", sum(rest))] if rest else [])]
    rows.append((f"{len(sizes)} packages", sum(sizes.values())))
    return format_table(("package", "MiB"), [(name, f"{size / MEBIBYTE:.1f}") for name, size in rows])


def install(extras: str, folder: Path) -> Path:
    """Install this checkout's wheel with ``extras``; the folder of the packages."""
    wheel = build_wheel(folder)
    venv.create(folder / "environment", with_pip=True)
    pip = (str(folder / "environment" / "bin" / "python"), "-m", "pip", "--disable-pip-version-check")
    pinned = ("-c", str(ROOT / "constraints.txt"))
    require(run(*pip, "install", "--quiet", "--no-compile", *pinned, f"{wheel}[{extras}]", cwd=folder))
    (site,) = (folder / "environment" / "lib").glob("python3*/site-packages")
    return site


def main(arguments: list[str] | None = None) -> int:
    """Print the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("extras", nargs="*", metavar="EXTRA", default=["openvino"])
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        print(make_table(measure_packages(install(",".join(options.extras), Path(name)))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
