"""A bundle in a real server of KServe's protocol: MLServer, with the runtime of ``examples/mlserver``.

``make test-servers`` runs this in an environment of its own: MLServer demands an older FastAPI.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest

from cmt_edge.deploy import Predictor
from cmt_edge.deploy.cli import predict, verify
from cmt_edge.deploy.errors import RuntimeMissingError
from helpers.bundles import make_bundle
from helpers.paths import ROOT

pytest.importorskip("tritonclient", reason='needs the extra "kserve"')
if find_spec("mlserver") is None:  # not imported here: both packages define the protocol's messages
    pytest.skip("needs MLServer: make test-servers", allow_module_level=True)

START_LIMIT_S = 120
EXAMPLE = ROOT / "examples" / "mlserver"


def find_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("bundles") / "tiny")


@pytest.fixture(scope="module")
def started(bundle, tmp_path_factory):
    """The server's process, and its model as a device."""
    folder = tmp_path_factory.mktemp("served")
    subprocess.run([sys.executable, EXAMPLE / "bundle_runtime.py", bundle.path, folder], check=True)
    settings = json.loads((folder / "settings.json").read_text())
    settings |= {"grpc_port": find_port(), "http_port": find_port()}
    (folder / "settings.json").write_text(json.dumps(settings))
    path = os.pathsep.join([str(EXAMPLE), str(ROOT / "src")])
    log = folder / "server.log"
    with log.open("w") as out:
        server = subprocess.Popen(
            [Path(sys.executable).parent / "mlserver", "start", folder],
            env=os.environ | {"PYTHONPATH": path},
            stdout=out,
            stderr=out,
        )
    try:
        address = f"127.0.0.1:{settings['grpc_port']}/tiny"
        wait_until_ready(bundle, address, server, log)
        yield server, address
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture
def device(started):
    return started[1]


def wait_until_ready(bundle, address, server, log) -> None:
    end = time.monotonic() + START_LIMIT_S
    while True:
        assert server.poll() is None, log.read_text()
        try:
            Predictor.load(bundle, backend="kserve", device=address).close()
        except RuntimeMissingError:
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.5)
        else:
            return


def test_the_answers_are_those_of_the_predictor(bundle, device):
    images = bundle.golden().sources
    with (
        Predictor.load(bundle) as local,
        Predictor.load(bundle, backend="kserve", device=device) as remote,
    ):
        assert remote.info.runtime.startswith("mlserver ")
        for here, there in zip(local.predict(images), remote.predict(images), strict=True):
            assert here.logits.tobytes() == there.logits.tobytes()


def test_the_commands(bundle, device, tmp_path):
    picture = tmp_path / "one.png"
    picture.write_bytes(bundle.golden().sources[0])
    flags = ["--backend", "kserve", "--device", device]
    assert verify.main([str(bundle.path), *flags]) == 0
    assert predict.main([str(bundle.path), str(picture), *flags]) == 0


@pytest.mark.parametrize("change", [("/tiny", "/other"), ("/tiny", "/tiny/7")])
def test_a_model_that_the_server_lacks(bundle, device, change):
    with pytest.raises(RuntimeMissingError, match="does not offer"):
        Predictor.load(bundle, backend="kserve", device=device.replace(*change))


def test_an_encrypted_connection_to_a_server_without(bundle, device):
    with pytest.raises(RuntimeMissingError, match="no inference server answers"):
        Predictor.load(bundle, backend="kserve", device=f"grpcs://{device}")


def test_a_server_that_dies_gives_right_answers_or_one_error(bundle, started):
    """The last test of this module."""
    server, device = started
    image = bundle.golden().sources[0]
    with Predictor.load(bundle) as local:
        expected = local(image).logits.tobytes()
    answered = threading.Semaphore(0)

    def ask() -> RuntimeMissingError:
        while True:
            try:
                assert remote(image).logits.tobytes() == expected
            except RuntimeMissingError as exc:
                return exc
            answered.release()

    with Predictor.load(bundle, backend="kserve", device=device) as remote, ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(ask) for _ in range(4)]
        for _ in range(20):
            assert answered.acquire(timeout=START_LIMIT_S)
        server.kill()
        errors = [found.result(START_LIMIT_S) for found in asked]
    assert {error.what for error in errors} == {"the server did not answer a batch of images"}
    assert {error.exit_code for error in errors} == {3}
