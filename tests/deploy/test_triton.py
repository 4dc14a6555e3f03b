"""What ``serve-repo`` writes, in a real Triton: it reads the settings, warms up, makes batches.

NVIDIA's wheel ``nvidia-pytriton`` holds Triton's server with its Python backend, and no other one. So each
test puts that backend in the place of ONNX Runtime's: a few lines that run the same ``model.onnx`` in ONNX
Runtime. All other settings are those that were written. ``make test-triton`` runs this in an environment of
its own.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from cmt_edge.deploy import Predictor
from cmt_edge.deploy.bundle.sections import BATCH, TensorEntry
from cmt_edge.deploy.cli import serve_repo, verify
from cmt_edge.deploy.errors import RuntimeMissingError
from helpers.bundles import LABELS, SIZE, make_bundle
from helpers.images import COLOURS, coloured, folder_of

pytest.importorskip("tritonclient", reason='needs the extra "kserve"')
pytest.importorskip("onnxruntime", reason="the backend of these tests runs ONNX Runtime")
FOUND = find_spec("pytriton")  # not imported: it would start threads
if FOUND is None:
    pytest.skip("needs Triton's server: make test-triton", allow_module_level=True)

PACKAGE = Path(FOUND.submodule_search_locations[0])
SERVER = PACKAGE / "tritonserver"
START_LIMIT_S = 120
MODEL = """\
import json
import sys
from pathlib import Path

sys.path[:0] = {paths!r}
import onnxruntime
import triton_python_backend_utils as triton


class TritonPythonModel:
    def initialize(self, args):
        self.outputs = [entry["name"] for entry in json.loads(args["model_config"])["output"]]
        self.session = onnxruntime.InferenceSession(Path(__file__).with_name("model.onnx"))
        self.input = self.session.get_inputs()[0].name

    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        batch = triton.get_input_tensor_by_name(request, self.input).as_numpy()
        answers = self.session.run(self.outputs, {{self.input: batch}})
        return triton.InferenceResponse(list(map(triton.Tensor, self.outputs, answers)))
"""
"""A model of Triton's Python backend in the place of ONNX Runtime's backend."""


def find_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def put_python_in(folder: Path) -> None:
    """Let the Python backend run a model; nothing else of its settings changes."""
    config = folder / "config.pbtxt"
    text = config.read_text()
    assert text.count('"onnxruntime"') == 1
    assert text.count('default_model_filename: "model.onnx"') == 1
    text = text.replace('"onnxruntime"', '"python"')
    config.write_text(
        text.replace('default_model_filename: "model.onnx"', 'default_model_filename: "model.py"')
    )
    (folder / "1" / "model.py").write_text(MODEL.format(paths=[path for path in sys.path if path]))


def copy_backends(target: Path) -> Path:
    """Triton's backends, with the Python backend's part for this interpreter in its place."""
    shutil.copytree(SERVER / "backends", target)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = SERVER / "python_backend_stubs" / version / "triton_python_backend_stub"
    shutil.copy(stub, target / "python")
    (target / "python" / stub.name).chmod(0o755)
    return target


@contextmanager
def running(repository: Path):
    """A server; the address of its gRPC and that of its HTTP."""
    grpc, http = find_port(), find_port()
    libraries = [PACKAGE.parent / "nvidia_pytriton.libs", sysconfig.get_config_var("LIBDIR")]
    command = [SERVER / "bin" / "tritonserver", "--model-repository", repository]
    command += ["--backend-directory", copy_backends(repository.with_name("backends"))]
    command += ["--allow-metrics=false", "--log-verbose=1"]
    command += ["--grpc-address=127.0.0.1", f"--grpc-port={grpc}"]
    command += ["--http-address=127.0.0.1", f"--http-port={http}"]
    log = repository.parent / "server.log"
    with log.open("w") as out:
        settings = os.environ | {"LD_LIBRARY_PATH": os.pathsep.join(map(str, libraries))}
        server = subprocess.Popen(command, env=settings, stdout=out, stderr=out)
    try:
        end = time.monotonic() + START_LIMIT_S
        while "Started HTTPService" not in log.read_text():
            assert server.poll() is None, log.read_text()[-5000:]
            assert time.monotonic() < end, log.read_text()[-5000:]
            time.sleep(0.2)
        yield f"127.0.0.1:{grpc}", f"http://127.0.0.1:{http}", log
    finally:
        server.terminate()
        server.wait(60)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    """One whose graph takes one image, and one whose graph takes any number."""
    folder = tmp_path_factory.mktemp("bundles")
    dynamic = {
        "input": TensorEntry(name="input", shape=(BATCH, 3, SIZE, SIZE), dtype="float32"),
        "outputs": (TensorEntry(name="logits", shape=(BATCH, len(LABELS)), dtype="float32"),),
    }
    return [make_bundle(folder / "fixed"), make_bundle(folder / "dynamic", **dynamic)]


@pytest.fixture(scope="module")
def server(bundles, tmp_path_factory):
    repository = tmp_path_factory.mktemp("triton") / "models"
    flags = ["-o", str(repository), "--for", "triton", "--queue-delay-us", "200000", "--max-batch", "4"]
    assert serve_repo.main([str(bundles[1].path), *flags]) == 0
    other = repository.with_name("other")
    assert serve_repo.main([str(bundles[0].path), "-o", str(other), "--for", "triton"]) == 0
    (other / "fixed").rename(repository / "fixed")
    for name in ("fixed", "dynamic"):
        put_python_in(repository / name)
    with running(repository) as found:
        yield found


@pytest.mark.parametrize("place", [0, 1])
def test_verify_passes(bundles, server, place):
    bundle = bundles[place]
    device = f"{server[0]}/{bundle.name}"
    assert verify.main([str(bundle.path), "--backend", "kserve", "--device", device, "--quiet"]) == 0


def test_labelled_images_are_asked_for_in_batches_that_the_server_takes(bundles, server, tmp_path):
    """``verify`` has 16 images at once, this server takes 4."""
    folder_of(tmp_path, {name: [coloured(name, shade) for shade in range(6)] for name in COLOURS})
    flags = ["--backend", "kserve", "--device", f"{server[0]}/dynamic", "--quiet", "--data", str(tmp_path)]
    assert verify.main([str(bundles[1].path), *flags, "--reference", str(bundles[1].path)]) == 0


@pytest.mark.parametrize("place", [0, 1])
def test_answers_are_bit_for_bit_those_of_onnx_runtime(bundles, server, place):
    bundle = bundles[place]
    images = bundle.golden().sources
    with (
        Predictor.load(bundle) as local,
        Predictor.load(bundle, backend="kserve", device=f"{server[0]}/{bundle.name}") as remote,
    ):
        assert remote.info.runtime.startswith("triton ")
        for here, there in zip(local.predict(images), remote.predict(images), strict=True):
            assert here.logits.tobytes() == there.logits.tobytes()


def test_the_golden_images_warmed_it_up(server):
    log = server[2].read_text()
    for name in ("fixed", "dynamic"):
        assert f"model '{name}' instance {name}_0_0 is running warmup sample 'golden images'" in log


def test_requests_at_once_become_batches(bundles, server):
    """Four requests come within the time that the first may wait."""
    batch = np.zeros((1, 3, SIZE, SIZE), np.float32)
    with (
        Predictor.load(bundles[1], backend="kserve", device=f"{server[0]}/dynamic") as remote,
        ThreadPoolExecutor(4) as pool,
    ):
        list(pool.map(lambda _: remote.session.run(batch), range(16)))
    with urllib.request.urlopen(f"{server[1]}/v2/models/dynamic/stats", timeout=30) as response:
        (stats,) = json.load(response)["model_stats"]
    assert max(entry["batch_size"] for entry in stats["batch_stats"]) > 1
    assert max(entry["batch_size"] for entry in stats["batch_stats"]) <= 4


def test_classes_carry_the_labels(bundles, server):
    """Triton itself reads ``labels.txt`` where a client asks for classes."""
    import tritonclient.grpc as client

    image = np.zeros((1, 3, SIZE, SIZE), np.float32)
    image[:, 2] = 1.0
    given = client.InferInput("input", list(image.shape), "FP32")
    given.set_data_from_numpy(image)
    asked = client.InferRequestedOutput("logits", class_count=1)
    connection = client.InferenceServerClient(server[0])
    try:
        answer = connection.infer("dynamic", [given], outputs=[asked]).as_numpy("logits")
    finally:
        connection.close()
    assert answer.ravel()[0].decode().split(":")[1:] == ["2", LABELS[2]]


def test_a_model_that_it_lacks(bundles, server):
    with pytest.raises(RuntimeMissingError, match="does not offer"):
        Predictor.load(bundles[0], backend="kserve", device=f"{server[0]}/other")
