"""Answers that are no numbers, inputs that no memory holds, and bundles in folders of any name."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from cmt_edge.deploy import Predictor
from cmt_edge.deploy.backends import fake
from cmt_edge.deploy.backends.fake import FakeSession
from cmt_edge.deploy.errors import BundleError, InputError
from helpers.bundles import LABELS, make_bundle, tiny
from helpers.images import RED

# --- answers that are none ------------------------------------------------------------------------


class Broken(FakeSession):
    """Answers ``value`` for the last class."""

    value = float("nan")

    def run(self, batch):
        (logits,) = super().run(batch)
        logits[:, -1] = self.value
        return [logits]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("way", ["call", "predict", "stream", "attempt", "logits"])
def test_answers_that_are_not_finite_are_errors(value, way):
    session = Broken(len(LABELS))
    session.value = value
    with tiny(session=session) as predictor:
        ask = {
            "call": predictor,
            "predict": lambda image: predictor.predict([image]),
            "stream": lambda image: list(predictor.stream([image])),
            "attempt": lambda image: list(predictor.attempt([image])),
            "logits": lambda image: predictor.logits(predictor.prepare([image])),
        }
        with pytest.raises(BundleError, match="NaN or infinite"):
            ask[way](RED)
        session.value = 0.5
        assert ask[way](RED) is not None  # the Predictor stays usable


@pytest.mark.usefixtures("served_by_fake")
@pytest.mark.parametrize("command", ["predict", "bench"])
@pytest.mark.parametrize("output", [[], ["--json"]])
def test_commands_name_the_bundle_whose_answers_are_not_finite(
    tmp_path, monkeypatch, capsys, command, output
):
    from cmt_edge.deploy.cli import bench, predict

    bundle = make_bundle(tmp_path / "b")
    (tmp_path / "a.png").write_bytes(RED)
    monkeypatch.setattr(fake.RUNTIME, "load", lambda bundle, options: Broken(len(LABELS)))
    main = {"predict": predict.main, "bench": bench.main}[command]
    images = [str(tmp_path / "a.png")] if command == "predict" else ["--iters", "2", "--seconds", "0"]
    assert main([str(bundle.path), *images, *output]) == 2
    printed = capsys.readouterr()
    assert "NaN or infinite" in printed.err
    assert str(bundle.path) in printed.err
    if output:
        assert set(json.loads(printed.out)) == {"error"}
    else:
        assert "nan" not in printed.out.lower()


# --- memory ---------------------------------------------------------------------------------------


def test_no_memory_for_the_input_is_a_typed_error(monkeypatch):
    def fail(self, shape):
        raise MemoryError

    monkeypatch.setattr(FakeSession, "bind", fail)
    with tiny() as predictor, pytest.raises(InputError, match="no memory for an input of 1 x 3"):
        predictor(RED)


@pytest.mark.parametrize("name", [b"b\xff\xfe", b"\x9b1m", "schön".encode(), b"a b\n"])
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_folder_of_any_name_opens(tmp_path, name, backend):
    """Linux allows every byte in names but the slash and zero."""
    place = os.path.join(os.fsencode(tmp_path), name)
    try:
        os.mkdir(place)
    except OSError:
        pytest.skip("this file system allows only UTF-8 in names")
    made = make_bundle(tmp_path / "b")
    bundle = Path(os.fsdecode(place)) / "b"
    made.path.rename(bundle)
    with Predictor.load(bundle, backend=backend) as predictor:
        assert predictor(RED).label == "red"
        batch = predictor.prepare([RED])
        assert predictor.session.executed(batch).operations
