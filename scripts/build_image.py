"""Builds the images of examples/container without Docker, and does what their README shows in each.

    python scripts/build_image.py BUNDLE PICTURES [--base ARCHIVE] [--folder FOLDER] [-- OPTION ...]

It needs Linux, root, ``buildah`` (Debian: ``apt-get install buildah``) and ``ip``. What follows ``--`` is
given to ``buildah build``, for example ``--volume /etc/pip.conf:/etc/pip.conf:ro`` where pip needs settings
of this machine.

The base image is pulled from its registry. Where none can be reached, give ``--base debian``: ``debootstrap``
then makes an image of Debian with its own Python, and it gets the name that the Dockerfile asks for. It
stands in for the official one, so the sizes that are printed name both parts.

The containers run without a network, with a read-only root, as the image's user, and see the bundle and the
pictures read-only. The exit code is 1 if a command in a container does not end as expected.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from cmt_edge.deploy.report import format_table

ROOT = Path(__file__).resolve().parent.parent
"""The checkout."""
FILE = ROOT / "examples" / "container" / "Dockerfile"
"""What is built."""
STAGES = {"device": "cmt-edge", "service": "cmt-edge-service"}
"""Stage of the Dockerfile -> the name of its image."""
DEBIAN = "bookworm"
"""The release of Debian that ``--base debian`` installs; its Python is 3.11."""
PACKAGES = ("ca-certificates", "netbase", "tzdata", "python3", "python3-pip")
"""What the stand-in has besides Debian's smallest set, as the official image has."""
MEGABYTE = 1_000_000
"""Bytes, as ``docker image ls`` counts them."""

ENTER = """
set -eu
root=$1 bundle=$2 pictures=$3; shift 3
mount --bind "$root" "$root"
mount -t proc proc "$root/proc"
mount --rbind /sys "$root/sys"
mount -t tmpfs none "$root/dev"
for name in null zero random urandom; do
    touch "$root/dev/$name"
    mount --bind "/dev/$name" "$root/dev/$name"
done
mkdir -p "$root/bundle" "$root/pictures"
mount --bind "$bundle" "$root/bundle"
mount --bind "$pictures" "$root/pictures"
mount -o remount,bind,ro "$root/bundle"
mount -o remount,bind,ro "$root/pictures"
mount -o remount,bind,ro "$root"
ip link set lo up
exec chroot "$@"
"""
"""Makes the file system of a container in namespaces of its own, and starts a program there."""

ASK = """
import json, signal, subprocess, sys, time, urllib.request
entry, health, picture = json.loads(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3]
service = subprocess.Popen(entry)
try:
    for _ in range(240):
        if service.poll() is not None:
            sys.exit(f"the service ended with {service.returncode}")
        if subprocess.run(health, stderr=subprocess.DEVNULL).returncode == 0:
            break
        time.sleep(0.5)
    else:
        sys.exit("the service did not become healthy")
    body = open(picture, "rb").read()
    answer = json.load(urllib.request.urlopen("http://127.0.0.1:8080/predict", body, timeout=60))
    print("healthy;", picture, "is", answer["label"])
    service.send_signal(signal.SIGTERM)
    sys.exit(service.wait(60))
finally:
    service.kill()
"""
"""Starts the service, waits until the image's own check finds it healthy, sends a picture and stops it."""


@dataclass(frozen=True)
class Image:
    """A built image.

    Attributes:
        name: its name.
        size: bytes of its files.
        root: folder with the files of a container that was made of it.
        config: what Docker records of it: user, environment, programs.
    """

    name: str
    size: int
    root: Path
    config: dict[str, object] = field(repr=False)

    def read_words(self, key: str) -> list[str]:
        """A list of words of the configuration; empty where it has none."""
        words = self.config.get(key) or []
        assert isinstance(words, list)
        return [str(word) for word in words]


class Buildah:
    """The program ``buildah`` with a storage of its own, which needs no service and no mounts.

    Args:
        folder: where its files go.
    """

    def __init__(self, folder: Path) -> None:
        self.storage = ("--root", str(folder / "store"), "--runroot", str(folder / "run"))

    def run(self, *words: str, is_shown: bool = False) -> str:
        """What a command of buildah's prints; the script ends where it fails."""
        command = ("buildah", *self.storage, "--storage-driver", "vfs", *words)
        output = None if is_shown else subprocess.PIPE
        done = subprocess.run(command, stdout=output, text=True, check=False, cwd=ROOT)
        if done.returncode:
            raise SystemExit(f"error: buildah {words[0]} ended with {done.returncode}")
        return (done.stdout or "").strip()


def read_base() -> str:
    """The name of the image that the Dockerfile begins with."""
    text = FILE.read_text(encoding="utf-8")
    (tag,) = re.findall(r"^ARG PYTHON=(.+)$", text, re.MULTILINE)
    (name,) = set(re.findall(r"^FROM (\S+) AS ", text, re.MULTILINE))
    return f"docker.io/library/{name.replace('${PYTHON}', tag)}"


def make_debian(folder: Path) -> Path:
    """An archive of Debian with Python, whose pip installs for the system, as in the official image."""
    root = folder / "debian"
    include = f"--include={','.join(PACKAGES)}"
    subprocess.run(("debootstrap", "--variant=minbase", include, DEBIAN, str(root)), check=True)
    for path in (
        *root.glob("var/cache/apt/archives/*.deb"),
        *root.glob("usr/lib/python3*/EXTERNALLY-MANAGED"),
    ):
        path.unlink()
    shutil.rmtree(root / "var/lib/apt/lists")
    (root / "usr/bin/python").symlink_to("python3")
    archive = folder / "debian.tar"
    subprocess.run(("tar", "-C", str(root), "-cf", str(archive), "."), check=True)
    shutil.rmtree(root)
    return archive


def import_base(buildah: Buildah, archive: Path) -> None:
    """Make an image of an archive of files, under the name that the Dockerfile asks for."""
    container = buildah.run("from", "scratch")
    buildah.run("add", container, str(archive), "/")
    path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    buildah.run("config", "--env", path, "--cmd", "python3", container)
    buildah.run("commit", "--quiet", "--rm", container, read_base())


def read_version() -> str:
    """The version of the checkout, which the Dockerfile must be told."""
    return subprocess.check_output((sys.executable, "-m", "setuptools_scm"), cwd=ROOT, text=True).strip()


def build(buildah: Buildah, stage: str, options: list[str]) -> Image:
    """Build a stage of the Dockerfile, and make a container of it."""
    name = STAGES[stage]
    told = ("--build-arg", f"VERSION={read_version()}", "--target", stage, "--tag", name)
    how = ("--isolation", "chroot", "--format", "docker", "--pull-never", "--file", str(FILE))
    buildah.run("build", *how, *told, *options, str(ROOT), is_shown=True)
    root = Path(buildah.run("mount", buildah.run("from", "--pull-never", name)))
    found = json.loads(buildah.run("inspect", "--type", "image", name))
    return Image(name, measure(root), root, found["Docker"]["config"])


def measure(root: Path) -> int:
    """Bytes of the files in a folder; a file with two names counts once."""
    found = {}
    for folder, _, names in os.walk(root):
        for name in names:
            status = os.lstat(os.path.join(folder, name))
            found[status.st_ino] = status.st_size
    return sum(found.values())


def read_home(image: Image) -> str:
    """The home folder of the image's user, which Docker puts into ``HOME``."""
    lines = (image.root / "etc/passwd").read_text(encoding="utf-8").splitlines()
    homes = {fields[2]: fields[5] for fields in (line.split(":") for line in lines)}
    return homes[str(image.config["User"])]


def run_inside(image: Image, command: list[str], options: argparse.Namespace) -> int:
    """Run a command as a container of ``image`` would; its exit code."""
    user = str(image.config["User"])
    variables = (*image.read_words("Env"), f"HOME={read_home(image)}")
    mounted = (str(image.root), str(options.bundle.resolve()), str(options.pictures.resolve()))
    namespaces = ("unshare", "--mount", "--net", "--ipc", "--uts", "--pid", "--fork", "--kill-child")
    enter = (*namespaces, "sh", "-c", ENTER, "enter", *mounted)
    inside = (f"--userspec={user}:{user}", str(image.root), "/usr/bin/env", "-i", *variables, *command)
    print("+", image.name, *command[:3], flush=True)
    return subprocess.run((*enter, *inside), check=False).returncode


def try_device(image: Image, options: argparse.Namespace) -> list[str]:
    """Run what the README shows; the commands that failed."""
    entry = image.read_words("Entrypoint")
    commands = (
        image.read_words("Cmd"),
        ["doctor", "--format", "openvino"],
        ["predict", "/bundle", "/pictures"],
        ["verify", "/bundle"],
        ["bench", "/bundle", "--seconds", "1"],
    )
    return [
        f"{image.name} {' '.join(command)}"
        for command in commands
        if run_inside(image, entry + command, options)
    ]


def try_service(image: Image, options: argparse.Namespace) -> list[str]:
    """Start the service, ask it about a picture, and stop it as ``docker stop`` does."""
    health = image.config["Healthcheck"]
    assert isinstance(health, dict)
    picture = min(path.name for path in options.pictures.iterdir())
    programs = (json.dumps(image.read_words("Entrypoint")), json.dumps(health["Test"][1:]))
    failed = run_inside(image, ["python3", "-c", ASK, *programs, f"/pictures/{picture}"], options)
    return [f"{image.name}: start, health, /predict, SIGTERM"] if failed else []


@contextmanager
def choose_folder(folder: Path | None) -> Iterator[Path]:
    """The folder in which to work: the given one, which stays, or one that goes at the end."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="cmt-edge-image-") as name:
        yield Path(name)


def prepare_base(buildah: Buildah, base: str | None, folder: Path) -> int:
    """Get the image that the Dockerfile begins with; the bytes of its files."""
    if base is None:
        buildah.run("pull", "--quiet", read_base())
    else:
        import_base(buildah, make_debian(folder) if base == "debian" else Path(base).resolve())
    container = buildah.run("from", "--pull-never", read_base())
    size = measure(Path(buildah.run("mount", container)))
    buildah.run("rm", container)
    return size


def build_parser() -> argparse.ArgumentParser:
    """The options of the script."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", type=Path, help="a bundle for OpenVINO")
    parser.add_argument("pictures", type=Path, help="a folder of pictures")
    parser.add_argument(
        "--base",
        metavar="ARCHIVE",
        help="a base image as tar archive, or 'debian' to make one (default: pull it)",
    )
    parser.add_argument(
        "--folder", type=Path, help="work in this folder, and keep it (default: a temporary one)"
    )
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Build both images, try them, print their sizes; returns 1 if a command failed."""
    words = sys.argv[1:] if arguments is None else arguments
    mine = words.index("--") if "--" in words else len(words)
    options = build_parser().parse_args(words[:mine])
    options.options = words[mine + 1 :]
    missing = [name for name in ("buildah", "unshare", "ip") if shutil.which(name) is None]
    if missing or os.geteuid():
        raise SystemExit(
            f"error: needs root, and these programs that are missing: {' '.join(missing) or '-'}"
        )
    failed = []
    with choose_folder(options.folder) as folder:
        buildah = Buildah(folder)
        base = prepare_base(buildah, options.base, folder)
        device = build(buildah, "device", options.options)
        failed += try_device(device, options)
        service = build(buildah, "service", options.options)
        failed += try_service(service, options)
        buildah.run("rm", "--all")
    rows = [
        (
            image.name,
            f"{image.size / MEGABYTE:.0f}",
            f"{base / MEGABYTE:.0f}",
            f"{(image.size - base) / MEGABYTE:.0f}",
        )
        for image in (device, service)
    ]
    print(format_table(("image", "MB", "of it the base", "added"), rows))
    print(*(f"failed: {command}" for command in failed), sep="\n")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
