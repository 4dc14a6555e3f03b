"""Archives of images that somebody hostile wrote: a typed error or the images, soon and in little memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cmt_edge.deploy.errors import DataError
from cmt_edge.deploy.images import ImageSet

BLOCK = 512
END = bytes(2 * BLOCK)
GIB_20 = 20 << 30
SECONDS = 20
"""CPU time that an archive may take."""
MEMORY = 1 << 29
"""Bytes of address space that an archive may take beyond what the imports have taken."""

READ = f"""
import resource, sys
from pathlib import Path
from cmt_edge.deploy.errors import DataError
from cmt_edge.deploy.images import ImageSet
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + {MEMORY},) * 2)
resource.setrlimit(resource.RLIMIT_CPU, ({SECONDS},) * 2)
try:
    images = ImageSet(sys.argv[1], labelled=False)
    [images.read(item) for item in images.items[:9]]
    print(len(images))
except DataError as exc:
    print(exc)
"""
"""Reads an archive within limits, and prints the number of its images or the typed error."""


def octal(size: int) -> bytes:
    return b"%011o\0" % size


def binary(size: int) -> bytes:
    """A size beyond octal digits, or a negative one."""
    return (b"\xff" if size < 0 else b"\x80") + (size % (1 << 88)).to_bytes(11, "big")


def header(name: bytes = b"a/x.png", size: bytes = octal(0), kind: bytes = b"0", link: bytes = b"") -> bytes:
    made = bytearray(BLOCK)
    parts = {0: name[:100], 100: b"0000644\0", 124: size, 136: octal(0), 156: kind, 157: link[:100]}
    for at, value in {**parts, 148: b" " * 8, 257: b"ustar\x0000"}.items():
        made[at : at + len(value)] = value
    made[148:156] = b"%06o\0 " % sum(made)
    return bytes(made)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % BLOCK)


def pax(*records: tuple[bytes, bytes]) -> bytes:
    """A header with attributes of the member after it."""
    lines = []
    for key, value in records:
        body = b" " + key + b"=" + value + b"\n"
        length = len(body) + 1
        while len(b"%d" % length) + len(body) != length:
            length = len(b"%d" % length) + len(body)
        lines.append(b"%d" % length + body)
    return pax_of(b"".join(lines))


def pax_of(text: bytes) -> bytes:
    return header(b"p", octal(len(text)), b"x") + padded(text)


def long_name(size: bytes, kind: bytes = b"L") -> bytes:
    return header(b"././@LongLink", size, kind)


GOOD = header(size=octal(3)) + padded(b"abc")
SPARSE = pax((b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0"))
REFUSED = {
    "20 GB": header(size=binary(GIB_20)) + END,
    "2**80": GOOD + header(size=binary(1 << 80)) + END,
    "negative at first": header(size=binary(-BLOCK)) + END,
    "negative, for ever": GOOD + header(size=binary(-BLOCK)) + END,
    "negative, back to the start": GOOD + header(size=binary(-3 * BLOCK)) + END,
    "a long name of 20 GB": long_name(binary(GIB_20)) + GOOD + END,
    "a long name of 2**80": long_name(binary(1 << 80)) + GOOD + END,
    "a long name of negative size": long_name(binary(-BLOCK)) + GOOD + END,
    "a long link of 20 GB": long_name(binary(GIB_20), b"K") + GOOD + END,
    "attributes of 20 GB": long_name(binary(GIB_20), b"x") + GOOD + END,
    "common attributes of 20 GB": long_name(binary(GIB_20), b"g") + GOOD + END,
    "a chain of long names": (long_name(octal(BLOCK)) + b"n" * BLOCK) * 3000 + GOOD + END,
    "a chain of attributes": pax((b"comment", b"x")) * 3000 + GOOD + END,
    "attributes: a negative size": pax((b"size", b"-512")) + GOOD + END,
    "attributes: a size of -1": pax((b"size", b"-1")) + GOOD + END,
    "attributes: 2**80": pax((b"size", b"%d" % (1 << 80))) + GOOD + END,
    "attributes: no number": pax((b"size", b"abc")) + GOOD + END,
    "attributes: 5000 digits": pax((b"size", b"9" * 5000)) + GOOD + END,
    "attributes: half a million digits": pax_of(b"1" * 500_000) + GOOD + END,
    "attributes: length 0": pax_of(b"0 path=x\n") + GOOD + END,
    "sparse: no map": SPARSE + header(size=octal(BLOCK)) + b"5" * BLOCK * 2000 + END,
    "sparse: a map without end": SPARSE + header(size=octal(BLOCK)) + b"9999999999\n" + b"1\n" * (1 << 20),
    "sparse: a map of letters": pax((b"GNU.sparse.map", b"a,b,c")) + GOOD + END,
    "cut off": header(size=octal(100_000)) + bytes(BLOCK),
    "a link to itself": header(b"a.png", kind=b"1", link=b"a.png") + END,
    "links in a circle": header(b"a.png", kind=b"2", link=b"b.png")
    + header(b"b.png", kind=b"2", link=b"a.png")
    + END,
    "out of the archive": header(b"a.png", kind=b"2", link=b"../../etc/passwd") + END,
    "links that multiply": b"".join(header(b"a/%d.png" % i) for i in range(300))
    + b"".join(header(b"%d/x" % i, kind=b"2", link=b"../a") for i in range(3000))
    + END,
    "links that multiply twenty times": GOOD
    + b"".join(
        header(b"d%d/l%d" % (level + 1, i), kind=b"2", link=b"../d%d" % level)
        for level in range(19)
        for i in range(40)
    )
    + header(b"d0/a", kind=b"2", link=b"../a")
    + END,
}
"""What is wrong with an archive without images that could be read -> its bytes."""

READ_ANYWAY = {
    "a device beside an image": header(b"a/y.png", kind=b"3") + GOOD + END,
    "a link to its own folder": header(b"d", kind=b"2", link=b".") + GOOD + END,
    "a name that is no UTF-8": header(b"a/\xff\xfe.png") + END,
    "a very long name": pax((b"path", b"a/" * 100_000 + b"x.png")) + GOOD + END,
}
"""What is odd about an archive with one image -> its bytes."""


@pytest.mark.parametrize("name", REFUSED)
def test_a_hostile_archive_is_refused(tmp_path, name):
    assert "archive" in outcome(tmp_path, REFUSED[name])


@pytest.mark.parametrize("name", READ_ANYWAY)
def test_an_odd_archive_is_read(tmp_path, name):
    assert outcome(tmp_path, READ_ANYWAY[name]) == "1\n"


def test_an_archive_of_many_entries_is_read(tmp_path):
    count = 20_000
    entries = b"".join(header(b"c/%d.png" % i) for i in range(count))
    assert outcome(tmp_path, entries + END) == f"{count}\n"


def test_a_member_after_a_large_one_is_found(tmp_path):
    """Sizes beyond octal digits are no fault where the bytes exist."""
    archive = tmp_path / "big.tar"
    with open(archive, "wb") as file:
        file.write(header(b"a/big.bin", size=binary(9 << 30)))
        file.seek(BLOCK + (9 << 30))
        file.write(GOOD + END)
    images = ImageSet(archive)
    assert [images.read(item) for item in images] == [b"abc"]


def test_an_archive_is_named(tmp_path):
    archive = tmp_path / "x.tar"
    archive.write_bytes(REFUSED["20 GB"])
    with pytest.raises(DataError, match=r"x\.tar"):
        ImageSet(archive)


def outcome(folder: Path, archive: bytes) -> str:
    """What a process with limits says of an archive."""
    if sys.platform != "linux":
        pytest.skip("limits memory with setrlimit")
    file = folder / "archive.tar"
    file.write_bytes(archive)
    command = [sys.executable, "-c", READ, str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
