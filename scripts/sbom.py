"""Write the software bill of materials of an extra, in CycloneDX JSON.

usage: .venv-supply/bin/python scripts/sbom.py OUTPUT [--extra EXTRA]

``make supply`` makes the environment of this script. The components are what pip would install for the extra
(``all``) at the pinned versions, each with its licence and the SHA-256 of the file that pip chose here, and
with what it requires. The result is checked against CycloneDX's own schema before it is written. The same
commit and the same packages give the same bytes: the time stamp is ``SOURCE_DATE_EPOCH``, or else the time of
the last commit, and the serial number is derived from the contents. The exit code is 1 if the schema finds a
fault, or if nothing requires one of the components.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from uuid import NAMESPACE_URL, uuid5

from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model import ExternalReference, ExternalReferenceType, HashAlgorithm, HashType, XsUri
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output import make_outputter
from cyclonedx.schema import OutputFormat, SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from licences import find_licence
from packageurl import PackageURL
from resolved import PROJECT, ROOT, Package, find_required, find_unreached, resolve

SCHEMA = SchemaVersion.V1_6
"""The version of CycloneDX."""


def read_time() -> datetime:
    """The time of the bill: ``SOURCE_DATE_EPOCH``, or else the time of the last commit."""
    seconds = os.environ.get("SOURCE_DATE_EPOCH")
    if not seconds:
        command = ["git", "log", "-1", "--format=%ct"]
        seconds = subprocess.check_output(command, cwd=ROOT, text=True).strip()
    return datetime.fromtimestamp(int(seconds), timezone.utc)


def make_component(package: Package) -> Component:
    """The entry of a package."""
    licence = find_licence(package.metadata)
    link = ExternalReference(type=ExternalReferenceType.WEBSITE, url=XsUri(package.link))
    hashes = [HashType(alg=HashAlgorithm.SHA_256, content=package.sha256)] if package.sha256 else []
    return Component(
        type=ComponentType.APPLICATION if package.key == PROJECT else ComponentType.LIBRARY,
        name=package.name,
        version=package.version,
        bom_ref=f"{package.key}=={package.version}",
        purl=PackageURL("pypi", name=package.key, version=package.version),
        licenses=[LicenseFactory().make_from_string(licence)] if licence else [],
        hashes=hashes,
        external_references=[link] if package.link else [],
    )


def make_bill(packages: Sequence[Package], extra: str, time: datetime) -> Bom:
    """The bill of a resolved extra, without a serial number."""
    components = {package.key: make_component(package) for package in packages}
    bill = Bom()
    bill.metadata.timestamp = time
    bill.metadata.component = components[PROJECT]
    for package in packages:
        if package.key != PROJECT:
            bill.components.add(components[package.key])
        required = find_required(package, [extra] if package.key == PROJECT else [])
        present = [components[name] for name in sorted(required & components.keys())]
        bill.register_dependency(components[package.key], present)
    return bill


def write_text(bill: Bom) -> str:
    """The bill as JSON, with a serial number that its other contents decide."""
    bill.serial_number = uuid5(NAMESPACE_URL, PROJECT)
    draft = make_outputter(bill, OutputFormat.JSON, SCHEMA).output_as_string(indent=2)
    bill.serial_number = uuid5(NAMESPACE_URL, draft)
    return make_outputter(bill, OutputFormat.JSON, SCHEMA).output_as_string(indent=2) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Write the bill; returns 1 if it does not fit the schema, or if nothing requires a package."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="the file to write")
    parser.add_argument("--extra", default="all", metavar="EXTRA", help="the extra (default: all)")
    options = parser.parse_args(arguments)
    packages = resolve(options.extra)
    if unreached := find_unreached(packages, options.extra):
        print(f"Nothing requires these packages: {', '.join(unreached)}", file=sys.stderr)
        return 1
    text = write_text(make_bill(packages, options.extra, read_time()))
    if fault := JsonStrictValidator(SCHEMA).validate_str(text):
        print(f"The bill does not fit the schema: {fault}", file=sys.stderr)
        return 1
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(text, encoding="utf-8")
    hashed = sum(bool(package.sha256) for package in packages)
    version = SCHEMA.to_version()
    print(f"{options.output}: CycloneDX {version}, valid; {len(packages)} components, {hashed} with a hash")
    return 0


if __name__ == "__main__":
    sys.exit(main())
