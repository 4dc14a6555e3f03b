"""One API over every runtime: equal inputs give equal answers, wrong ones typed errors, from any number of
threads."""

from __future__ import annotations

import gc
import importlib.util
import io
import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from cmt_edge.calib.generated import generate
from cmt_edge.deploy import Bundle, Prediction, Predictor, preprocess
from cmt_edge.deploy.backends import RUNTIME_OF_FORMAT, RUNTIMES, Runtime, get_runtime
from cmt_edge.deploy.backends.fake import FakeSession
from cmt_edge.deploy.bundle.sections import RanOn
from cmt_edge.deploy.errors import (
    BundleError,
    DataError,
    ImageError,
    InputError,
    RuntimeMissingError,
    UnknownNameError,
)
from helpers.bundles import edit_manifest, make_bundle, tiny
from helpers.images import BLUE, GREEN, RED

BACKENDS = ("openvino", "onnxruntime", "torch", "fake")


REAL = ("openvino", "onnxruntime", "torch")


@pytest.fixture(scope="module")
def blobs() -> list[bytes]:
    return generate(5, 72, seed=3)


@pytest.fixture(scope="module", params=BACKENDS)
def predictor(request, fp32_bundle):
    """The static fp32 bundle in each runtime."""
    with Predictor.load(fp32_bundle.path, backend=request.param, threads=1) as p:
        yield p


@pytest.fixture(scope="module")
def expected(fp32_bundle, blobs):
    """Logits of the PyTorch reference."""
    with Predictor.load(fp32_bundle, backend="torch", threads=1) as p:
        return np.stack([q.logits for q in p.predict(blobs)])


def decoders() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("decode")]


# --- every runtime --------------------------------------------------------------------------------


def test_predictions_have_one_shape_everywhere(predictor, fp32_bundle, blobs):
    answer = predictor(blobs[0])
    assert isinstance(answer, Prediction)
    assert answer.logits.shape == (10,)
    assert answer.logits.dtype == np.float32
    assert answer.probabilities.dtype == np.float32
    assert answer.probabilities.sum() == pytest.approx(1, abs=1e-5)
    assert answer.label == fp32_bundle.labels[int(answer.logits.argmax())] == answer.top(1)[0][0]
    assert predictor.labels == fp32_bundle.labels
    assert predictor.info == RanOn(predictor.session.runtime, predictor.session.device)


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("which", ["fp32_bundle", "onnx_bundle"])
def test_runtimes_agree_with_the_reference(request, which, name, blobs, expected):
    with Predictor.load(request.getfixturevalue(which), backend=name, threads=1) as p:
        np.testing.assert_allclose(
            np.stack([q.logits for q in p.predict(blobs)]), expected, atol=1e-4, rtol=0
        )
        batch = np.stack([preprocess(b, p.spec) for b in blobs])
        np.testing.assert_allclose(p.logits(batch), expected, atol=1e-4, rtol=0)


def test_every_kind_of_source_gives_the_same_answer(predictor, blobs, tmp_path):
    path = tmp_path / "image.png"
    path.write_bytes(blobs[0])
    image = Image.open(io.BytesIO(blobs[0]))
    want = predictor(blobs[0]).logits
    with open(path, "rb") as file:
        sources = [path, str(path), blobs[0], io.BytesIO(blobs[0]), file, image, np.asarray(image)]
        answers = predictor.predict(sources)
    for answer in answers:
        np.testing.assert_allclose(answer.logits, want, atol=1e-4, rtol=0)
    assert [a.source for a in answers] == [str(path)] * 2 + [None] * 5


def test_predict_keeps_the_order(predictor, blobs):
    alone = [predictor(b).logits for b in blobs]
    for order in ([0, 1, 2, 3, 4], [4, 2, 0, 0, 3, 1, 1, 2, 4, 0, 3]):
        answers = predictor.predict([blobs[i] for i in order])
        assert len(answers) == len(order)
        for i, answer in zip(order, answers, strict=True):
            np.testing.assert_allclose(answer.logits, alone[i], atol=1e-5, rtol=0)


def test_nothing_in_nothing_out(predictor):
    assert predictor.predict([]) == []
    assert list(predictor.stream([])) == []
    assert predictor.logits(np.empty((0, 3, 64, 64), np.float32)).shape == (0, 10)


@pytest.mark.parametrize("count", [1, 2, 9])
def test_any_number_of_inputs(predictor, count):
    batch = np.random.default_rng(0).standard_normal((count, 3, 64, 64)).astype(np.float32)
    whole = predictor.logits(batch)
    assert whole.shape == (count, 10)
    assert whole.dtype == np.float32
    np.testing.assert_allclose(
        whole, np.concatenate([predictor.logits(b[None]) for b in batch]), atol=1e-4, rtol=0
    )
    np.testing.assert_allclose(predictor.logits(np.asfortranarray(batch)), whole, atol=1e-5, rtol=0)


def test_answers_do_not_share_memory_with_the_runtime(predictor, blobs):
    first = predictor(blobs[0]).logits
    kept = first.copy()
    batch = np.zeros((1, 3, 64, 64), np.float32)
    zero = predictor.logits(batch)
    kept_zero = zero.copy()
    predictor(blobs[1])
    np.testing.assert_array_equal(first, kept)
    np.testing.assert_array_equal(zero, kept_zero)
    assert not batch.any()


GOOD = np.zeros((2, 3, 64, 64), np.float32)


def spoiled(value: float) -> np.ndarray:
    batch = GOOD.copy()
    batch[1, 2, 3, 4] = value
    return batch


WRONG = {
    "float64": GOOD.astype(np.float64),
    "float16": GOOD.astype(np.float16),
    "uint8": GOOD.astype(np.uint8),
    "one image": GOOD[0],
    "rank 5": GOOD[None],
    "NHWC": GOOD.transpose(0, 2, 3, 1),
    "other size": np.zeros((1, 3, 32, 32), np.float32),
    "wide": np.zeros((1, 3, 64, 65), np.float32),
    "grey": np.zeros((1, 1, 64, 64), np.float32),
    "NaN": spoiled(np.nan),
    "inf": spoiled(np.inf),
    "-inf": spoiled(-np.inf),
    "list": GOOD.tolist(),
    "none": None,
    "path": "image.png",
}


@pytest.mark.parametrize("batch", WRONG.values(), ids=WRONG.keys())
def test_wrong_batches_are_input_errors(predictor, batch):
    with pytest.raises(InputError) as caught:
        predictor.logits(batch)
    assert not isinstance(caught.value, DataError)
    assert caught.value.remedy


def test_bad_image_in_a_list_is_named(predictor, blobs, tmp_path):
    (tmp_path / "bad.jpg").write_bytes(blobs[0][:30])
    with pytest.raises(ImageError, match=r"bad\.jpg"):
        predictor.predict([blobs[0], tmp_path / "bad.jpg", blobs[1]])


@pytest.mark.parametrize("name", BACKENDS)
def test_closed_predictor(fp32_bundle, blobs, name):
    with Predictor.load(fp32_bundle, backend=name, threads=1) as p:
        p(blobs[0])
    for use in (
        lambda: p(blobs[0]),
        lambda: p.logits(np.zeros((1, 3, 64, 64), np.float32)),
        lambda: list(p.stream(blobs)),
    ):
        with pytest.raises(InputError, match="closed"):
            use()
    p.close()


def test_predictor_is_closed_after_an_error(blobs):
    class Counting(FakeSession):
        closed = 0

        def close(self):
            self.closed += 1

    session = Counting(3)
    with pytest.raises(RuntimeError), tiny(session=session):
        raise RuntimeError
    assert session.closed == 1


@pytest.mark.parametrize("name", ["openvino", "onnxruntime"])
@pytest.mark.parametrize("which", ["fp32_bundle", "onnx_bundle"])
def test_many_threads_get_the_serial_answers(request, which, name):
    batch = np.random.default_rng(1).standard_normal((24, 1, 3, 64, 64)).astype(np.float32)
    with Predictor.load(request.getfixturevalue(which), backend=name, threads=1) as p:
        serial = [p.logits(b) for b in batch]
        order = [int(i) for i in np.random.default_rng(2).permutation(np.repeat(np.arange(24), 6))]
        with ThreadPoolExecutor(12) as pool:
            answers = list(pool.map(lambda i: p.logits(batch[i]), order))
    for i, answer in zip(order, answers, strict=True):
        np.testing.assert_allclose(answer, serial[i], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["openvino", "onnxruntime"])
def test_throughput_mode_gives_the_same_answers(fp32_bundle, blobs, expected, name):
    with Predictor.load(fp32_bundle, backend=name, throughput=True) as p:
        assert p.session.parallelism >= 1
        np.testing.assert_allclose(np.stack([q.logits for q in p.stream(blobs)]), expected, atol=1e-4, rtol=0)


def test_fp32_bundle_runs_in_fp32(fp32_bundle):
    """OpenVINO's own default would be bfloat16 on processors that have it."""
    with Predictor.load(fp32_bundle) as p:
        executed = p.session.executed(np.zeros((1, 3, 64, 64), np.float32))
    assert set(executed.operations) == {"fp32"}
    assert executed.time_share["fp32"] == pytest.approx(1)
    assert executed.summary() == "fp32 100 %"


def test_int8_bundle_runs_in_int8(int8_bundle):
    with Predictor.load(int8_bundle) as p:
        executed = p.session.executed(np.zeros((1, 3, 64, 64), np.float32))
    assert executed.operations["int8"] >= 10
    assert executed.time_share["int8"] >= 0.1
    assert sum(executed.time_share.values()) == pytest.approx(1)
    assert 0 <= executed.conversion_share <= 1


@pytest.mark.parametrize("name", ["openvino", "onnxruntime"])
def test_int8_bundle_agrees_on_the_class(int8_bundle, cifar, name):
    from cmt_edge.deploy.images import ImageSet

    images = ImageSet(cifar / "test")
    sources = [images.read(item) for item in images.items[::100]]
    sides = [Predictor.load(int8_bundle, backend=runtime, threads=1) for runtime in (name, "torch")]
    ours, theirs = ([q.label for q in side.stream(sources)] for side in sides)
    assert np.mean([a == b for a, b in zip(ours, theirs, strict=True)]) >= 0.9


def test_int8_that_drawn_images_calibrated_is_near_float32_on_photographs(int8_bundle, fp32_bundle, cifar):
    from cmt_edge.deploy.images import ImageSet

    images = ImageSet(cifar / "test")
    sources = [images.read(item) for item in images.items[::50]]
    sides = []
    for bundle in (fp32_bundle, int8_bundle):
        with Predictor.load(bundle) as p:
            sides.append(np.concatenate([p.logits(p.prepare([source])) for source in sources]))
    exact, ours = sides
    assert np.abs(ours - exact).mean() < 0.06 * exact.std()  # 0.08 with channels rescaled by their ranges


# --- choosing a runtime ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("which", "runtime"),
    [("fp32_bundle", "openvino"), ("onnx_bundle", "onnxruntime"), ("int8_bundle", "openvino")],
)
def test_default_runtime_is_the_one_of_the_format(request, which, runtime):
    with Predictor.load(str(request.getfixturevalue(which).path)) as p:
        assert p.info.runtime.startswith(f"{runtime} ")


@pytest.mark.parametrize(
    ("asked", "close"),
    [
        ("openvin", "openvino"),
        ("OpenVINO", "openvino"),
        ("onnx", "onnxruntime"),
        ("onnx_runtime", "onnxruntime"),
        ("pytorch", "torch"),
    ],
)
def test_unknown_backend_offers_close_names(tmp_path, asked, close):
    with pytest.raises(UnknownNameError) as caught:
        Predictor.load(make_bundle(tmp_path / "b"), backend=asked)
    assert close in caught.value.remedy
    assert asked in str(caught.value)
    assert caught.value.exit_code == 2


def test_hopeless_backend_name_lists_all():
    with pytest.raises(UnknownNameError) as caught:
        get_runtime("zzzz")
    assert all(name in caught.value.remedy for name, entry in RUNTIMES.items() if not entry.is_double)


@pytest.mark.parametrize("name", REAL)
def test_missing_runtime(monkeypatch, fp32_bundle, name):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda package, *a: None if package == name else find(package, *a)
    )
    with pytest.raises(RuntimeMissingError, match="not installed") as caught:
        Predictor.load(fp32_bundle, backend=name)
    assert caught.value.exit_code == 3
    assert "pip install" in caught.value.remedy
    assert Predictor.load(fp32_bundle, backend="fake")


@pytest.mark.parametrize("name", REAL)
def test_missing_device(fp32_bundle, name):
    with pytest.raises(RuntimeMissingError, match="no device") as caught:
        Predictor.load(fp32_bundle, backend=name, device="NPU9")
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("name", REAL)
def test_device_names_ignore_case(fp32_bundle, name):
    with Predictor.load(fp32_bundle, backend=name, device="cpu") as p:
        assert p.info.device == "CPU"


def test_bf16_bundle_is_refused_by_onnxruntime(fp32_bundle):
    bundle = Bundle(fp32_bundle.path, replace(fp32_bundle.manifest, precision="bf16"))
    with pytest.raises(InputError, match="bfloat16") as caught:
        Predictor.load(bundle, backend="onnxruntime")
    assert "openvino" in caught.value.remedy


def test_precision_that_openvino_does_not_know(fp32_bundle):
    bundle = Bundle(fp32_bundle.path, replace(fp32_bundle.manifest, precision="fp4"))
    with pytest.raises(InputError, match="fp4"):
        Predictor.load(bundle, backend="openvino")


def test_torch_reference_of_other_weights_is_refused(fp32_bundle):
    model = fp32_bundle.manifest.model
    model = replace(model, weights=replace(model.weights, sha256="0" * 64))
    with pytest.raises(BundleError, match="weights"):
        Predictor.load(Bundle(fp32_bundle.path, replace(fp32_bundle.manifest, model=model)), backend="torch")


def test_model_that_nothing_here_can_rebuild(tmp_path):
    pytest.importorskip("torch", reason="needs torch, the backend that looks for the model")
    with pytest.raises(RuntimeMissingError, match="tiny"):
        Predictor.load(make_bundle(tmp_path / "b"), backend="torch")


@pytest.mark.parametrize("threads", [0, -2])
def test_impossible_thread_counts(tmp_path, threads):
    with pytest.raises(InputError, match="threads"):
        Predictor.load(make_bundle(tmp_path / "b"), threads=threads)


@pytest.mark.parametrize("name", REAL)
def test_thread_count_does_not_change_the_answer(fp32_bundle, blobs, expected, name):
    with Predictor.load(fp32_bundle, backend=name, threads=1) as p:
        np.testing.assert_allclose(p(blobs[0]).logits, expected[0], atol=1e-4, rtol=0)


def test_damaged_bundle_does_not_load(tmp_path):
    bundle = make_bundle(tmp_path / "b")
    (bundle.path / "model.bin").write_bytes(b"WEIGHTS")
    with pytest.raises(BundleError):
        Predictor.load(bundle.path)


INPUTS = {"no input entry": {}, "empty shape": {"shape": []}, "shape as text": {"shape": "x"}}


@pytest.mark.parametrize("entry", INPUTS.values(), ids=INPUTS.keys())
def test_manifest_without_an_input_shape(tmp_path, entry, monkeypatch):
    import cmt_edge.deploy.backends.onnxruntime as module

    monkeypatch.setattr(module.RUNTIME, "load", lambda bundle, options: FakeSession(3))
    bundle = make_bundle(tmp_path / "b", format="onnx")
    edit_manifest(bundle, lambda m: m.update(input=entry))
    with pytest.raises(BundleError):
        Predictor.load(bundle.path)


def test_every_format_has_a_runtime(gpu_machine):
    pytest.importorskip("torch", reason="needs torch, the runtime of one of the backends")
    assert set(RUNTIME_OF_FORMAT.values()) <= set(RUNTIMES)
    for name in set(RUNTIMES) - {"kserve"}:  # a client, which has its own tests
        runtime = get_runtime(name)
        assert isinstance(runtime, Runtime)
        assert runtime.check().split()[0] == name
        assert runtime.float_precision("fp32") == runtime.float_precision("fp32", None) == "fp32"


# --- batches --------------------------------------------------------------------------------------


class Recording(FakeSession):
    """Notes the batches it was given."""

    def __init__(self, classes: int) -> None:
        super().__init__(classes)
        self.sizes: list[int] = []

    def run(self, batch):
        assert batch.flags.c_contiguous
        assert batch.dtype == np.float32
        self.sizes.append(len(batch))
        return super().run(batch)


@pytest.mark.parametrize("count", range(10))
def test_static_batch_is_filled_up(count):
    batch = np.random.default_rng(0).random((count, 3, 16, 16)).astype(np.float32)
    session = Recording(3)
    answer = tiny(4, session=session).logits(batch)
    assert set(session.sizes) <= {4}
    assert len(session.sizes) == max(1, -(-count // 4))  # none at all: one run tells the shapes
    np.testing.assert_allclose(answer, FakeSession(3).run(batch)[0].reshape(count, 3), atol=1e-6)


@pytest.mark.parametrize("batch", [0, 1, 4, 16])
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_stream_of_any_batch_size_keeps_the_order(batch, workers):
    colours = [RED, GREEN, BLUE, BLUE, RED, GREEN, GREEN] * 3
    names = ["red", "green", "blue", "blue", "red", "green", "green"] * 3
    session = Recording(3)
    assert [p.label for p in tiny(batch, session=session).stream(colours, workers=workers)] == names
    if batch:
        assert set(session.sizes) == {batch}
    assert not decoders()


def test_exported_static_batch(onnx_bundle, blobs, expected):
    """A session of a fixed batch of four over a graph that takes any: three answers of padding never leak."""
    with Predictor.load(onnx_bundle) as p:
        four = Predictor(p.session, p.spec, p.labels, batch=4)
        np.testing.assert_allclose(
            np.stack([q.logits for q in four.predict(blobs)]), expected, atol=1e-4, rtol=0
        )


# --- streams --------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [0, 1, 4])
@pytest.mark.parametrize("workers", [0, 2])
def test_stream_is_lazy_on_endless_input(batch, workers):
    taken = 0

    def endless():
        nonlocal taken
        for blob in itertools.cycle([RED, GREEN, BLUE]):
            taken += 1
            yield blob

    stream = tiny(batch).stream(endless(), workers=workers)
    assert [p.label for p in itertools.islice(stream, 10)] == ["red", "green", "blue"] * 3 + ["red"]
    assert taken <= 10 + (batch or 8) + max(batch or 8, 2 * workers)
    stream.close()
    assert not decoders()


def test_stream_does_nothing_before_it_is_asked():
    def explosive():
        raise AssertionError("was read")
        yield

    assert iter(tiny().stream(explosive()))


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_stream_names_the_bad_file_and_ends_its_threads(tmp_path, workers):
    paths = []
    for i in range(12):
        paths.append(tmp_path / f"{i}.png")
        paths[-1].write_bytes(RED if i != 7 else RED[:40])
    stream = tiny().stream(paths, workers=workers)
    good = []
    with pytest.raises(ImageError, match=r"7\.png") as caught:
        good.extend(stream)
    assert caught.value.where == str(paths[7])
    assert not good or len(good) <= 7
    assert not decoders()


def test_answers_before_a_bad_file_are_given(tmp_path):
    stream = tiny().stream([RED, BLUE, tmp_path / "absent.png"])
    assert [next(stream).label, next(stream).label] == ["red", "blue"]
    with pytest.raises(ImageError, match="absent"):
        next(stream)


def test_error_of_the_iterable_itself_comes_through():
    def failing():
        yield RED
        raise ConnectionError("camera unplugged")

    with pytest.raises(ConnectionError, match="unplugged"):
        list(tiny(4).stream(failing()))
    assert not decoders()


def test_abandoned_stream_ends_its_threads():
    stream = tiny().stream(itertools.repeat(RED), workers=3)
    next(stream)
    assert decoders()
    del stream
    gc.collect()
    assert not decoders()


def test_streams_at_once_from_several_threads():
    p = tiny(4)
    want = ["red", "green", "blue"] * 10
    with ThreadPoolExecutor(6) as pool:
        runs = pool.map(lambda _: [q.label for q in p.stream([RED, GREEN, BLUE] * 10)], range(6))
        assert all(labels == want for labels in runs)
