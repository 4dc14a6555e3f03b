"""A model in a server: the same answers, the same commands, and clear errors where the server is another."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from cmt_edge.deploy import Predictor
from cmt_edge.deploy.backends import get_runtime
from cmt_edge.deploy.bundle.sections import BATCH, TensorEntry
from cmt_edge.deploy.cli import bench, predict, verify
from cmt_edge.deploy.errors import BundleError, InputError, RuntimeMissingError
from helpers.bundles import LABELS, SIZE, make_bundle

pytest.importorskip("tritonclient", reason='needs the extra "kserve"')
pytest.importorskip("onnxruntime", reason="the server of these tests runs ONNX Runtime")

from cmt_edge.deploy.backends.kserve import parse_address
from helpers.v2_server import serving


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("bundles") / "tiny")


@pytest.fixture
def server(bundle):
    with Predictor.load(bundle) as predictor, serving(bundle, predictor) as (device, behaviour):
        yield device, behaviour


def open_remote(bundle, device):
    return Predictor.load(bundle, backend="kserve", device=device)


def test_the_answers_are_those_of_the_runtime_in_the_server(bundle, server):
    images = bundle.golden().sources
    with Predictor.load(bundle) as local, open_remote(bundle, server[0]) as remote:
        for here, there in zip(local.predict(images), remote.predict(images), strict=True):
            np.testing.assert_array_equal(here.logits, there.logits)
        assert remote.info.runtime == "test server 1.2"
        assert remote.info.device == server[0]


def test_many_threads_at_once(bundle, server):
    with open_remote(bundle, server[0]) as remote, ThreadPoolExecutor(8) as pool:
        rng = np.random.default_rng(0)
        batches = [rng.normal(size=bundle.manifest.input.shape).astype(np.float32) for _ in range(32)]
        expected = [batch.mean((2, 3)) for batch in batches]
        with Predictor.load(bundle) as local:
            expected = [local.session.run(batch)[0] for batch in batches]
        for found, right in zip(pool.map(remote.session.run, batches), expected, strict=True):
            np.testing.assert_array_equal(found[0], right)


def test_verify_passes_on_the_right_server_and_fails_on_one_that_answers_wrongly(bundle, server, capsys):
    device, behaviour = server
    flags = [str(bundle.path), "--backend", "kserve", "--device", device, "--quiet"]
    assert verify.main(flags) == 0
    assert behaviour.calls
    behaviour.add = 1.0
    assert verify.main(flags) == 1


def test_predict_and_bench_take_a_server(bundle, server, tmp_path, capsys):
    picture = tmp_path / "one.png"
    picture.write_bytes(bundle.golden().sources[0])
    assert predict.main([str(bundle.path), str(picture), "--backend", "kserve", "--device", server[0]]) == 0
    capsys.readouterr()
    flags = [
        "--backend",
        "kserve",
        "--device",
        server[0],
        "--iters",
        "3",
        "--warmup",
        "1",
        "--seconds",
        "0.01",
        "--json",
    ]
    assert bench.main([str(bundle.path), *flags, "--no-throughput", "--quiet"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert "test server 1.2" in json.dumps(told)


@pytest.mark.parametrize(
    ("device", "host", "model", "version", "encrypted"),
    [
        ("localhost:8001/a", "localhost:8001", "a", "", False),
        ("grpc://10.0.0.1:8001/a/3", "10.0.0.1:8001", "a", "3", False),
        ("grpcs://box.example:443/a.b-c_d", "box.example:443", "a.b-c_d", "", True),
        ("[::1]:8001/m", "[::1]:8001", "m", "", False),
    ],
)
def test_addresses(device, host, model, version, encrypted):
    found = parse_address(device)
    assert (found.host, found.model, found.version, found.encrypted) == (host, model, version, encrypted)
    assert parse_address(str(found)) == found


@pytest.mark.parametrize(
    "device",
    [None, "", "CPU", "box", "box:8001", "http://box:8000/m", "a:1/m/x", "a:1/../m", "a:0/m", "a:65536/m"],
)
def test_what_is_no_address(bundle, device):
    with pytest.raises(InputError, match="server") as caught:
        open_remote(bundle, device)
    assert "HOST:PORT/MODEL" in str(caught.value)


def test_no_server(bundle):
    with pytest.raises(RuntimeMissingError, match="no inference server answers") as caught:
        open_remote(bundle, "127.0.0.1:9/tiny")
    assert "gRPC" in caught.value.remedy


def test_a_model_that_the_server_lacks(bundle, server):
    device = server[0].replace("/tiny", "/other")
    with pytest.raises(RuntimeMissingError, match="does not offer") as caught:
        open_remote(bundle, device)
    assert "no model other" in caught.value.why
    assert "name and version" in caught.value.remedy
    assert "\x1b" not in str(caught.value), "the server's words steer no terminal"


def test_a_batch_that_is_larger_than_the_server_takes(tmp_path):
    """gRPC's own limit is 4 MiB. The connection goes on."""
    shapes = {"input": (BATCH, 3, SIZE, SIZE), "logits": (BATCH, len(LABELS))}
    source, target = (TensorEntry(name=name, shape=shape, dtype="float32") for name, shape in shapes.items())
    bundle = make_bundle(tmp_path / "dynamic", input=source, outputs=(target,))
    images = np.zeros((1400, 3, SIZE, SIZE), np.float32)
    with (
        Predictor.load(bundle) as local,
        serving(bundle, local) as (device, _),
        open_remote(bundle, device) as remote,
    ):
        with pytest.raises(RuntimeMissingError, match="did not answer a batch") as caught:
            remote.logits(images)
        assert len(remote.logits(images[:2])) == 2
    assert "larger than max" in caught.value.why
    assert "fewer images at once" in caught.value.remedy


def test_a_model_that_is_not_ready(bundle, server):
    server[1].ready = False
    with pytest.raises(RuntimeMissingError, match="not ready"):
        open_remote(bundle, server[0])


def test_another_model_under_the_name(bundle, server):
    entry = bundle.manifest.input
    server[1].inputs = (replace(entry, shape=(1, 3, 999, 999)),)
    with pytest.raises(RuntimeMissingError, match="not that of the bundle") as caught:
        open_remote(bundle, server[0])
    assert not isinstance(caught.value, BundleError), "the bundle is fine"
    assert "999" in caught.value.why


@pytest.mark.parametrize("fault", [{"dtype": "INT32"}, {"rows": 1}, {"columns": 1}, {"cut": 4}, {"cut": 12}])
def test_an_answer_of_another_form(bundle, server, fault):
    with open_remote(bundle, server[0]) as remote:
        for name, value in fault.items():
            setattr(server[1], name, value)
        with pytest.raises(RuntimeMissingError, match="expected float32"):
            remote(bundle.golden().sources[0])


def test_the_name_of_a_server_steers_no_terminal(bundle, server):
    server[1].name = "evil\x1b[2J\nserver"
    assert "\x1b" not in get_runtime("kserve").check(server[0])


def test_without_a_device_the_client_is_named():
    assert get_runtime("kserve").check().startswith("tritonclient ")
