"""Run the commands that the pages show, and write what they print.

usage: python scripts/docs_outputs.py [--check] [--quick] [--folder FOLDER] [--bundle BUNDLE]
                                      [--shared FOLDER]

In the pages a block that this script owns looks like this; ``slow`` is for what takes more than a few
seconds, ``data`` for what also needs CIFAR-10 and the checkpoint of cmt_nano, from the folder ``--shared``.
``only top-1`` keeps the lines that begin so; a command that stands in several blocks is run once, so that
these have the figures of one run:

    <!-- scripts/docs_outputs.py: slow -->
    ```console
    $ cmt-edge export --model cmt_nano --output out
    ...
    ```

The commands run in the order of ``PAGES``, in one folder, on the embedded model, so that a later one finds
what an earlier one made. ``--check`` writes nothing: it compares without times, shares and other figures of
the machine, and the exit code is 1 if a page says something else. ``--quick`` leaves the slow blocks alone;
``--bundle`` is then the int8 bundle that they would have made. Without ``--shared`` the blocks that need
data are left alone, which is said.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
"""The repository."""
PAGES = ("docs/quickstart.md", "docs/guides/my-checkpoint.md", "README.md")
"""The pages, in the order in which their commands run."""
DATA = ("data/cifar10.tar", "weights/cmt_nano_cifar10.pt")
"""What the blocks need that are run with data; it is named without its folder there."""
BUNDLE = Path("out/cmt_nano_int8_openvino")
"""The bundle that the quick blocks need, in the folder where commands run."""
TIME_LIMIT_S = 900
"""The longest time of one command, in seconds; a busy machine may need minutes for what takes seconds."""
WIDTH = "88"
"""The width to which tables fold, in characters: what the site shows without scrolling."""
RUN = "import sys; from cmt_edge.startup import edge; sys.exit(edge())"
"""What the script ``cmt-edge`` does, for a checkout whose scripts are not on the path."""

BLOCK = re.compile(
    r"(?P<mark><!-- scripts/docs_outputs\.py(?P<needs>: slow|: data)?(?:, only (?P<only>\S+))? -->\n"
    r"```console\n)"
    r"(?P<text>.*?)(?P<end>^```$)",
    re.MULTILINE | re.DOTALL,
)
"""A block of a page."""
COMMAND = re.compile(r"^\$ (?P<line>(?:.*\\\n)*.*)$", re.MULTILINE)
"""A command in a block; a backslash at the end of a line goes on with the next one."""

FOLDED = re.compile(r"(?<=\S)\n +(?=\S)")
"""What folds a line, and the beginning of an indented one."""
MACHINE = re.compile(
    r"^(warning: .*|fastest: .*|no clear .*|note: calibration was taken .*|.*; threads: .*)$", re.M
)
"""Lines that depend on the machine and on its load alone."""
PRECISIONS = re.compile(r"(?:int8|bf16|fp16|fp32) \d+ %(?: \+ (?:int8|bf16|fp16|fp32) \d+ %)*(?: \+(?=\s))?")
"""Which precisions ran, with their shares."""
FOLDED_SHARES = re.compile(r"(SHARES.*) SHARES$", re.M)
"""Shares of which a table has folded some into a second line, as on CPUs with more precisions."""
FIGURES = re.compile(
    r"[-+]?\d+(?:\.\d+)+(?:e[-+]?\d+)?|[-+]?\d+e[-+]?\d+"
    r"|[-+]?\d+(?= (?:%|(?:ms|MB|kB)\b))|\b\d+$|\b[0-9a-f]{12,}\b"
    r"|(?<= )-(?= )",
    re.M,
)
"""Figures, versions and hashes; a dash stands for a figure of which there were too few samples."""
SPACES = re.compile(r"[ \t]+|-{3,}")
"""What only lays a table out."""


@dataclass(frozen=True)
class Block:
    """A block of a page: its commands and what the page says that they print; ``only``: how the lines begin
    that it shows, where it does not show all."""

    page: str
    text: str
    is_slow: bool = False
    needs_data: bool = False
    only: str = ""

    @property
    def commands(self) -> list[str]:
        """The commands, in one line each."""
        return [match["line"] for match in COMMAND.finditer(self.text)]


def read_blocks(page: str, text: str) -> list[Block]:
    """The blocks of a page, in their order."""
    return [
        Block(page, match["text"], bool(match["needs"]), match["needs"] == ": data", match["only"] or "")
        for match in BLOCK.finditer(text)
    ]


def simplify(text: str) -> str:
    """What must not drift: the words of an output, without the figures of a machine."""
    text = PRECISIONS.sub("SHARES", MACHINE.sub("", FOLDED.sub(" ", text)))
    text = FOLDED_SHARES.sub(r"\1", SPACES.sub(" ", FIGURES.sub("#", text)))
    lines = (line.strip() for line in text.splitlines())
    return "\n".join(line for line in lines if line)


def make_folder(folder: Path, bundle: Path | None, shared: Path | None) -> dict[str, str]:
    """Prepare the folder in which commands run; returns their environment."""
    folder.mkdir(parents=True, exist_ok=True)
    places = [ROOT / "examples", *([shared / name for name in DATA] if shared else [])]
    for place in places:
        if not (folder / place.name).exists():
            (folder / place.name).symlink_to(place.resolve(strict=True))
    if bundle:
        shutil.copytree(bundle, folder / BUNDLE, dirs_exist_ok=True)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("CMT_EDGE_")}
    return {
        **kept,
        "PYTHONPATH": str(ROOT / "src"),
        "CMT_EDGE_CACHE": str(folder / "cache"),
        "CMT_EDGE_STATE": str(folder / "state"),
        "COLUMNS": WIDTH,
        "NO_COLOR": "1",
    }


def run_command(line: str, folder: Path, environment: dict[str, str]) -> str:
    """What a command prints on standard output.

    Raises:
        SystemExit: it failed.
    """
    words = shlex.split(line.replace("\\\n", " "))
    programs = {"cmt-edge": [sys.executable, "-c", RUN], "python": [sys.executable]}
    if words[0] not in programs:
        raise SystemExit(f"error: a page runs {words[0]}; only {', '.join(programs)} can be run")
    done = subprocess.run(
        [*programs[words[0]], *words[1:]],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT_S,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"error: exit code {done.returncode} of: {line}\n{done.stdout}{done.stderr}")
    return done.stdout.strip("\n")


def choose_lines(printed: str, only: str) -> str:
    """The lines that begin with ``only``, with what is folded below them."""
    kept, is_kept = [], False
    for line in printed.splitlines():
        if not line.startswith(" "):
            is_kept = line.startswith(only)
        if is_kept or not only:
            kept.append(line)
    return "\n".join(kept)


def write_block(block: Block, run: Callable[[str], str]) -> str:
    """The text of a block with what its commands print now."""
    parts = []
    for line in block.commands:
        printed = choose_lines(run(line), block.only)
        parts.append(f"$ {line}\n{printed}\n" if printed else f"$ {line}\n")
    return "\n".join(parts)


def find_drift(block: Block, fresh: str) -> str:
    """What differs between a page and the commands, as a diff; empty if nothing does."""
    old, new = simplify(block.text).splitlines(), simplify(fresh).splitlines()
    return "\n".join(difflib.unified_diff(old, new, block.page, "printed now", lineterm="", n=1))


def go_through(options: argparse.Namespace, folder: Path) -> list[str]:
    """Run the blocks of all pages, and write them or compare them; returns what drifted."""
    environment = make_folder(folder, options.bundle, options.shared)
    run = cache(partial(run_command, folder=folder, environment=environment))
    drifted = []
    for page in PAGES:
        path = ROOT / page
        text = path.read_text(encoding="utf-8")
        for block in read_blocks(page, text):
            if options.quick and block.is_slow:
                continue
            if block.needs_data and options.shared is None:
                print(f"{page}: a block needs --shared and was left alone", file=sys.stderr)
                continue
            fresh = write_block(block, run)
            if drift := find_drift(block, fresh):
                drifted.append(drift)
            text = text.replace(block.text, fresh)
        if not options.check:
            path.write_text(text, encoding="utf-8")
    return drifted


def main(arguments: list[str] | None = None) -> int:
    """Write the blocks, or check them; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, and compare")
    parser.add_argument("--quick", action="store_true", help="leave the slow blocks alone")
    parser.add_argument("--folder", type=Path, help="where commands run (default: a temporary folder)")
    parser.add_argument("--bundle", type=Path, help="an int8 bundle of cmt_nano for the quick blocks")
    parser.add_argument("--shared", type=Path, help=f"folder that holds {' and '.join(DATA)}")
    options = parser.parse_args(arguments)
    if options.folder:
        drifted = go_through(options, options.folder.resolve())
    else:
        with tempfile.TemporaryDirectory() as made:
            drifted = go_through(options, Path(made))
    if options.check and drifted:
        print(*drifted, "Run: python scripts/docs_outputs.py", sep="\n\n", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
