"""Write ``docs/cli.md``, the reference of all commands, from their parsers.

usage: python scripts/cli_reference.py [--check]

``--check`` writes nothing; the exit code is 1 if the page is not what the parsers say.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from made_page import write_or_check

from cmt_edge import __main__, startup

PAGE = Path(__file__).resolve().parent.parent / "docs" / "cli.md"
"""The reference."""
COMMANDS: dict[str, Callable[[], argparse.ArgumentParser]] = {
    f"cmt-edge {name}": import_module(f"cmt_edge.{command.module}").build_parser
    for name, command in __main__.COMMANDS.items()
}
"""Command -> what makes its parser, in the order of the page."""
PREFACE = """\
# Command line

This page is made by `python scripts/cli_reference.py` from the commands themselves.

One command, `cmt-edge`, has all others below it. `cmt-export` is the same as `cmt-edge export`, and so are
`cmt-predict`, `cmt-verify`, `cmt-bench` and `cmt-build`; where the scripts are not on the `PATH`,
`python -m cmt_edge export` is. A misspelled command, flag, model, format or runtime is refused with the names
that are close to it. Names may be written in any case: `--format OpenVINO`, `--precision INT8`.

`--json` prints one object last on standard output, also where the command fails:
`{"error": {"kind": "WeightsError", "exit_code": 2, "what": ..., "where": ..., "why": ..., "remedy": ...}}`.
`kind` is `UsageError` for words that the command line does not know, and `Interrupted` for a signal. Messages
for people stay on standard error. Colours appear on terminals only, and never where `NO_COLOR` is set.
Tables fold to the width of the terminal, or to `COLUMNS`.

`cmt-edge --completion bash` (or `zsh`, `tcsh`) prints what the TAB key needs, with the extra `completion`:

```sh
pip install "cmt-edge[completion]"
cmt-edge --completion bash > ~/.local/share/bash-completion/completions/cmt-edge
```

`cmt-edge export` also reads its options from a TOML file (`--config FILE`). The keys are the flags without
the leading `--`, with hyphens or underscores. A flag without a value is `true` or `false` there:
`int8 = true`, `no-build = true` (which is `build = false`). `mean`, `std` and `keep-float` may be arrays. The
keys stand at the top of the file or in a table `[export]` (or `[tool.cmt-edge]`); other tables beside it are
ignored. A flag wins over the file. From Python the options are the fields of `ExportConfig`.

Exit codes: 0 done and verified, 1 a verification or gate failed, 2 bad usage or input, 3 a runtime or device
is missing, 4 internal failure, 128 + N ended by signal N.
"""
"""What stands above the first command."""


class Markdown(argparse.HelpFormatter):
    """Formats a parser's help as tables, so that the page does not depend on argparse's own layout, which
    differs between versions of Python."""

    def __init__(self, prog: str, **_: Any) -> None:
        super().__init__(prog)
        self.parts: list[str] = []
        self.rows: list[str] = []
        self.heading = ""

    def add_usage(self, *_: Any, **__: Any) -> None:
        """Leave the usage line out: the tables say the same."""

    def add_text(self, text: str | None) -> None:
        """A description as it is; an epilog, which has several lines, as a block."""
        if text and "\n" in text:
            head, *lines = text.strip().splitlines()
            block = "\n".join(line.strip() for line in lines) % {"prog": self._prog}
            self.parts.append(f"{head.capitalize()}\n\n```sh\n{block}\n```")
        elif text:
            self.parts.append(text)

    def start_section(self, heading: str | None) -> None:
        """Begin a table."""
        self.heading, self.rows = heading or "", []

    def add_argument(self, action: argparse.Action) -> None:
        """A row of the table."""
        if action.help is not argparse.SUPPRESS:
            self.rows.append(f"| {_format_names(action)} | {self._write_help(action)} |")

    def end_section(self) -> None:
        """Close the table, unless it is empty."""
        if self.rows:
            head = self.heading[:1].upper() + self.heading[1:]
            self.parts.append("\n".join([f"| {head} | |", "| :--- | :--- |", *self.rows]))
        self.rows = []

    def format_help(self) -> str:
        """The tables of the whole command."""
        return "\n\n".join(self.parts) + "\n"

    def _write_help(self, action: argparse.Action) -> str:
        text = (action.help or "") % {**vars(action), "prog": ""}
        return text.replace("|", "\\|")


def _format_names(action: argparse.Action) -> str:
    """Flags and value of an option, or the name of an argument."""
    value = action.metavar or (action.dest if not action.option_strings else action.dest.upper())
    shown = str(value).replace("|", "\\|")
    if not action.option_strings:
        return f"`{shown}`"
    flags = ", ".join(f"`{flag}`" for flag in action.option_strings)
    return flags if action.nargs == 0 else f"{flags} `{shown}`"


def write_reference() -> str:
    """The whole page."""
    startup.front[:] = ["cmt-edge"]
    parts = [PREFACE]
    for name, make in COMMANDS.items():
        parser = make()
        parser.formatter_class = Markdown
        parts.append(f"## {name}\n\n{parser.format_help()}")
    return "\n".join(parts)


def main(argv: list[str]) -> int:
    """Write the page, or check it; returns the exit code."""
    return write_or_check(PAGE, write_reference(), argv, "scripts/cli_reference.py")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
