"""Commands called in this process, and what they print."""

from __future__ import annotations

import json


def strict(text: str):
    """JSON as other languages read it, without NaN and Infinity."""

    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def assert_told(out: str, err: str, code: int, *, is_json: bool) -> None:
    """A failure leaves standard output empty, or with ``--json`` one object that says what ``err`` says."""
    if not is_json:
        assert out == ""
        return
    error = strict(out)["error"]
    assert error["exit_code"] == code
    assert error["what"] in err


def failed(capsys, *argv: object, code: int = 2) -> str:
    """The message of a command that must fail with ``code``: one, on standard error, without a traceback."""
    from cmt_edge.export.cli import main

    try:
        status = main([str(a) for a in argv])
    except SystemExit as exc:  # argparse
        status = exc.code
    out, err = capsys.readouterr()
    assert status == code, err
    assert_told(out, err, code, is_json="--json" in argv)
    assert err.count("error: ") == 1
    assert "Traceback" not in err
    return err


def succeeded(capsys, *argv: object) -> str:
    from cmt_edge.export.cli import main

    status = main([str(a) for a in argv])
    out, err = capsys.readouterr()
    assert status == 0, err
    return out
