"""Commands called in this process, and what they print."""

from __future__ import annotations

import json

from cmt_edge.export.cli import main


def strict(text: str):
    """JSON as other languages read it, without NaN and Infinity."""

    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def failed(capsys, *argv: object, code: int = 2) -> str:
    """The message of a command that must fail with ``code``: one, on standard error, without a traceback."""
    try:
        status = main([str(a) for a in argv])
    except SystemExit as exc:  # argparse
        status = exc.code
    out, err = capsys.readouterr()
    assert status == code, err
    assert out == ""
    assert err.count("error: ") == 1
    assert "Traceback" not in err
    return err


def succeeded(capsys, *argv: object) -> str:
    status = main([str(a) for a in argv])
    out, err = capsys.readouterr()
    assert status == 0, err
    return out
