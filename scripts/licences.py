"""Write ``docs/licences.md``: the licence of every package that an extra installs.

usage: .venv-supply/bin/python scripts/licences.py [--environment FOLDER]

``make supply`` makes the environment of this script. pip tells the packages of each extra at the pinned
versions and their metadata, and installs nothing. The shared libraries that wheels bring along are those of
``FOLDER`` (``.venv``). The exit code is 1, and the page is not written, if a licence is unknown or refused.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Mapping
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import tomllib
from resolved import PROJECT, ROOT, UNCONSTRAINED, Package, normalize, resolve

PAGE = ROOT / "docs" / "licences.md"
"""The list."""

PERMITTED = frozenset(
    {
        "0BSD",
        "Apache-2.0",
        "Apache-2.0 WITH LLVM-exception",
        "BSD-2-Clause",
        "BSD-3-Clause",
        "BSL-1.0",
        "CC0-1.0",
        "FTL",
        "IJG",
        "LicenseRef-Matplotlib",
        "MIT",
        "MIT-0",
        "MIT-CMU",
        "MIT-Modern-Variant",
        "MPL-2.0",
        "PSF-2.0",
        "X11",
        "Zlib",
        "libpng-2.0",
        "libtiff",
    }
)
"""SPDX identifiers of the licences that a package or a library may have. Only MPL-2.0 among them has a
copyleft, which covers the package's own files."""

ALIASES = {
    "3-Clause BSD License": "BSD-3-Clause",
    "Apache 2.0": "Apache-2.0",
    "BSD 2-Clause License": "BSD-2-Clause",
    "BSD 3-Clause License": "BSD-3-Clause",
    "MIT License": "MIT",
}
"""First line of the metadata's licence -> the SPDX identifier, where the line says exactly one licence."""

CLASSIFIERS = {
    "License :: OSI Approved :: MIT License": "MIT",
    "License :: OSI Approved :: Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
}
"""Classifier -> the SPDX identifier, where the classifier says exactly one licence."""

READ = {
    "cycler": "BSD-3-Clause",
    "jinja2": "BSD-3-Clause",
    "kiwisolver": "BSD-3-Clause",
    "matplotlib": "LicenseRef-Matplotlib",
    "mlcommons-loadgen": "Apache-2.0",
    "mpmath": "BSD-3-Clause",
    "nvidia-ml-py": "BSD-3-Clause",
    "openvino-telemetry": "Apache-2.0",
    "safetensors": "Apache-2.0",
    "scipy": "BSD-3-Clause",
    "sympy": "BSD-3-Clause",
}
"""Package -> its licence as we read it in the wheel's licence file, where the metadata only names a family
such as "BSD" or "Apache". It is used only if the metadata gives no expression."""

GCC = "GPL-3.0-or-later WITH GCC-exception-3.1"
"""The licence of GCC's run-time libraries."""

LGPL = "LGPL-2.1-or-later"
"""The licence of libquadmath."""

LIBRARIES = {
    "libXau": "X11",
    "libavif": "BSD-2-Clause",
    "libbrotlicommon": "MIT",
    "libbrotlidec": "MIT",
    "libfreetype": "FTL",
    "libgfortran": GCC,
    "libgomp": GCC,
    "libharfbuzz": "MIT-Modern-Variant",
    "libhwloc": "BSD-3-Clause",
    "libjemalloc": "BSD-2-Clause",
    "libjpeg": "IJG AND BSD-3-Clause",
    "liblcms2": "MIT",
    "liblzma": "0BSD",
    "libopenjp2": "BSD-2-Clause",
    "libpng16": "libpng-2.0",
    "libquadmath": LGPL,
    "libscipy_openblas": "BSD-3-Clause",
    "libscipy_openblas64_": "BSD-3-Clause",
    "libsharpyuv": "BSD-3-Clause",
    "libtbb": "Apache-2.0",
    "libtbbbind_2_5": "Apache-2.0",
    "libtbbmalloc": "Apache-2.0",
    "libtbbmalloc_proxy": "Apache-2.0",
    "libtiff": "libtiff",
    "libwebp": "BSD-3-Clause",
    "libwebpdemux": "BSD-3-Clause",
    "libwebpmux": "BSD-3-Clause",
    "libxcb": "X11",
    "libzstd": "BSD-3-Clause",
}
"""Shared library of another project inside a wheel -> its licence. Of a choice (zstd, FreeType) it names the
part that we rely on."""

LIBRARY_EXCEPTIONS = frozenset({GCC, LGPL})
"""Licences that a separate shared library may have, and a package may not."""

COMPILER = "tensorrt-rtx"
"""Beginning of the names of packages that :data:`PROPRIETARY` installs; the tests have them too."""

OWN = (
    "libaoti_",
    "libarrow",
    "libbackend_with_compiler",
    "libc10",
    "libjitbackend_",
    "libonnxruntime",
    "libopenvino",
    "libparquet",
    "librt_",
    "libshm",
    "libtorch",
)
"""Beginnings of the names of libraries that belong to the package itself and have its licence."""

LIBRARY = re.compile(r"^(lib[\w+]+)(?:-[0-9a-f]{8})*[\w.-]*?\.so(?:\.[\d.]+)?$")
"""The name of a file of a shared library; its group is the name without hash and version."""

PROPRIETARY = ("rtx", "rtx-cu13")
"""Extras that install a compiler of NVIDIA's under its own licence. No other extra holds them."""

INTRODUCTION = """\
# Licences

This page is made by `make supply` ([supply-chain.md](supply-chain.md)). It lists what pip installs for
each extra at the versions of `constraints.txt`, on x86-64 Linux with Python 3.11, and the licences that
the metadata of the packages give. `all` is `export`, `openvino`, `onnxruntime`, `report` and `sign`
together. cmt-edge itself is Apache-2.0. The script stops at a licence that is unknown or that it does not
permit. It permits no package under the GPL, the AGPL, the LGPL or a proprietary licence.

- MPL-2.0 (`tqdm`, and in tests `hypothesis` and `pathspec`) asks you to publish your changes of those
  packages' own files. It asks nothing of your code.
- `cuda-bindings`, `cuda-pathfinder` and `nvidia-ml-py` are not pinned. Their versions are those of the
  day on which the page was made. They are open source. The driver, the CUDA libraries and TensorRT below
  them, which you install yourself, are NVIDIA's and proprietary.
- `kserve` needs older versions of protobuf and ml-dtypes than this list names. It is installed without
  `constraints.txt`.
- The extras `rtx` and `rtx-cu13` are not in this list. They install TensorRT for RTX (`tensorrt-rtx-cu12`,
  `tensorrt-rtx-cu13`) under a proprietary licence of NVIDIA's. No other extra needs them.
  `make test` installs the former, because NVIDIA's compiler takes part in the tests.
- `torch` is the CPU build here. The CUDA build, which pip takes from an ordinary index, also installs
  `triton` and NVIDIA's proprietary libraries (`nvidia-*`). They are not in this list.
"""
"""What stands above the tables."""

LIBRARY_TEXT = """\
## Libraries inside the wheels

Wheels carry shared libraries of other projects. This table lists those that are files of their own. What
is linked into a module (for example the AV1 decoder in Pillow) is described only by the package's own
licence files.

GCC's run-time libraries are under the GPL with an exception that lets programs of any licence use them.
libquadmath is under the LGPL and stays a file of its own, which you can replace. If you copy these files
into a product, add their licence texts and offer their sources.
"""
"""What stands above the table of libraries."""


def find_licence(metadata: Mapping[str, Any]) -> str:
    """The SPDX expression of a package's core metadata, or "" if the metadata and ``READ`` do not tell it."""
    if expression := metadata.get("license_expression"):
        return str(expression)
    if known := READ.get(normalize(metadata["name"])):
        return known
    first, _, more = (metadata.get("license") or "").strip().partition("\n")
    if first in ALIASES:
        return ALIASES[first]
    if first and not more:
        return first
    found = {CLASSIFIERS.get(classifier, "") for classifier in metadata.get("classifier", [])} - {""}
    return found.pop() if len(found) == 1 else ""


def find_refused(expression: str, permitted: frozenset[str]) -> list[str]:
    """The licences of an SPDX expression that are not permitted. Each part of a choice must be permitted,
    too: a person decides, and writes the choice into this script."""
    parts = re.split(r"\s+(?:AND|OR)\s+|[()]", expression)
    return sorted({part.strip() for part in parts} - permitted - {""})


def find_faults(packages: Iterable[Package], libraries: Mapping[str, set[str]]) -> list[str]:
    """One sentence for every package or library whose licence is unknown or not permitted."""
    faults = []
    for package in packages:
        licence = find_licence(package.metadata)
        if not licence:
            faults.append(f"The licence of {package.name} {package.version} is unknown.")
        elif refused := find_refused(licence, PERMITTED):
            faults.append(f"{package.name} {package.version} has a licence that is not permitted: {refused}.")
    for owner, names in sorted(libraries.items()):
        for name in sorted(names):
            if name not in LIBRARIES:
                faults.append(f"The licence of {name}, which {owner} brings along, is unknown.")
            elif refused := find_refused(LIBRARIES[name], PERMITTED | LIBRARY_EXCEPTIONS):
                faults.append(f"{name} of {owner} has a licence that is not permitted: {refused}.")
    return faults


def find_libraries(environment: Path) -> dict[str, set[str]]:
    """Package -> the shared libraries of other projects among its files, without hashes and versions."""
    folders = [str(folder) for folder in environment.glob("lib/python3*/site-packages")]
    found: dict[str, set[str]] = {}
    for distribution in distributions(path=folders):
        if normalize(distribution.metadata["Name"]).startswith(COMPILER):
            continue
        for path in distribution.files or []:
            match = LIBRARY.match(path.name)
            if match and not match[1].startswith(OWN):
                found.setdefault(normalize(distribution.metadata["Name"]), set()).add(match[1])
    return found


def read_extras() -> list[str]:
    """The extras of pyproject.toml that users install, then ``test``; not those of :data:`PROPRIETARY`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    left_out = {"all", "test-light", *PROPRIETARY}
    return [name for name in project["optional-dependencies"] if name not in left_out]


def show_pinned(resolved: dict[str, list[Package]]) -> None:
    """Let what an extra of :data:`UNCONSTRAINED` shares with others stand at the pinned version."""
    pinned = {p.key: p for extra, found in resolved.items() if extra not in UNCONSTRAINED for p in found}
    for extra in set(UNCONSTRAINED) & set(resolved):
        resolved[extra] = [pinned.get(package.key, package) for package in resolved[extra]]


def name_extras(key: str, contents: Mapping[str, set[str]]) -> str:
    """Which extras install a package; ``test`` is named only for what no other extra installs."""
    if key in contents[""]:
        return "always"
    extras = [extra for extra, keys in contents.items() if key in keys and extra != "all"]
    return ", ".join(f"`{extra}`" for extra in extras if extra != "test" or extras == ["test"])


def write_table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """A table of Markdown."""
    lines = [header, tuple(":---" for _ in header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def write_page(resolved: Mapping[str, list[Package]], libraries: Mapping[str, set[str]]) -> str:
    """The page, from what each extra installs ("" is the package without one) and the libraries."""
    contents = {extra: {package.key for package in packages} for extra, packages in resolved.items()}
    every = {(p.key, p.public_version): p for packages in resolved.values() for p in packages}
    rows = [
        (
            f"{p.name} {p.public_version}",
            find_licence(p.metadata),
            name_extras(p.key, contents),
            f"<{p.link}>",
        )
        for _, p in sorted(every.items())
    ]
    sizes = [(f"`{extra}`" if extra else "(none)", str(len(keys))) for extra, keys in contents.items()]
    shipped = [
        (owner, f"`{name}`", LIBRARIES[name])
        for owner, names in sorted(libraries.items())
        for name in sorted(names)
    ]
    parts = [
        INTRODUCTION,
        write_table(("Extra", "Packages besides cmt-edge"), sizes) + "\n",
        write_table(("Package", "Licence (SPDX)", "Installed by", "Project"), rows) + "\n",
        LIBRARY_TEXT,
        write_table(("Package", "Library", "Licence (SPDX)"), shipped),
    ]
    return "\n".join(parts) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Write the page; returns 1 if a licence is unknown or not permitted."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--environment", type=Path, default=ROOT / ".venv", metavar="FOLDER")
    options = parser.parse_args(arguments)
    libraries = find_libraries(options.environment)
    if not libraries:
        parser.error(f"{options.environment} has no packages with libraries; make it with: make demo")
    resolved = {
        extra: [package for package in resolve(extra) if package.key != PROJECT]
        for extra in ["", *read_extras(), "all"]
    }
    show_pinned(resolved)
    packages = [package for packages in resolved.values() for package in packages]
    if faults := sorted(set(find_faults(packages, libraries))):
        print(*faults, sep="\n", file=sys.stderr)
        return 1
    PAGE.write_text(write_page(resolved, libraries), encoding="utf-8")
    licences = {find_licence(package.metadata) for package in packages}
    count = len({package.key for package in packages})
    print(f"{PAGE.relative_to(ROOT)}: {count} packages, {len(licences)} licences, all of them permitted")
    return 0


if __name__ == "__main__":
    sys.exit(main())
