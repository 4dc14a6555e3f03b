"""What is measured for a report: changed images, parts of an answer, time by block, memory, time left."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image

from cmt_edge.deploy import Predictor
from cmt_edge.deploy.backends.profile import NodeRun, Profile
from cmt_edge.deploy.bundle import Bundle
from cmt_edge.deploy.cli import verify
from cmt_edge.deploy.errors import BundleError
from cmt_edge.deploy.images import ImageSet
from cmt_edge.deploy.measure import memory as memory_module
from cmt_edge.deploy.measure.breakdown import break_down, find_blocks, read_blocks
from cmt_edge.deploy.measure.confusion import MOST_LISTED, count_answers
from cmt_edge.deploy.measure.flipped import SIDE, choose_flipped
from cmt_edge.deploy.measure.memory import read_memory
from cmt_edge.deploy.measure.parity import verify as run_verify
from cmt_edge.deploy.measure.stages import measure_stages
from cmt_edge.deploy.progress import describe_left
from cmt_edge.deploy.report.html import read_reported
from cmt_edge.deploy.report.html.layers import find_length
from helpers.bundles import make_bundle, recorded_bundle
from helpers.images import coloured_folder


def node(name: str, seconds: float, *sources: str, kind: str = "Conv", precision: str = "int8") -> NodeRun:
    return NodeRun(name, kind, precision, seconds, False, sources)


def test_losses_come_before_gains_and_before_the_rest():
    truth = np.array([0, 0, 1, 1, 2])
    reference = np.array([0, 0, 0, 1, 0])
    bundle = np.array([0, 1, 1, 0, 1])
    assert choose_flipped(truth, reference, bundle, 9) == [1, 3, 2, 4]
    assert choose_flipped(truth, reference, bundle, 2) == [1, 3]


def test_every_pair_of_answers_is_counted():
    reference, bundle = np.array([0, 0, 1, 1, 1]), np.array([0, 1, 1, 1, 0])
    assert count_answers(reference, bundle, 2) == ((1, 1), (1, 2))
    assert count_answers(reference, bundle, MOST_LISTED + 1) is None


def test_an_operation_counts_to_the_last_block_that_it_computes():
    other = node("other", 4, "c", kind="MatMul", precision="bf16")
    nodes = [node("reorder", 1), node("fused", 3, "a", "b"), other]
    blocks = {"a": "stem", "b": "stages.0", "c": "head"}
    assert find_blocks([*nodes, node("end", 0)], blocks) == ["stages.0", "stages.0", "head", ""]
    found = break_down(Profile(tuple(nodes), "x"), blocks)
    kinds = [(part.name, part.share, part.operations) for part in found.kinds]
    assert kinds == [("Conv", 0.5, 2), ("MatMul", 0.5, 1)]
    assert [(part.name, part.share, part.precisions) for part in found.blocks] == [
        ("stages.0", 0.5, {"int8": 0.5}),
        ("head", 0.5, {"bf16": 0.5}),
    ]
    assert break_down(Profile(tuple(nodes), "x"), {}).blocks == ()


def test_the_profile_of_a_bundle_names_its_blocks(fp32_bundle):
    blocks = read_blocks(fp32_bundle)
    with Predictor.load(fp32_bundle) as predictor:
        profile = predictor.session.profile(np.zeros((1, 3, 64, 64), np.float32), 1)
    found = break_down(profile, blocks)
    assert {"stem.0", "stages.0.blocks.0", "stages.3.blocks.1"} <= {part.name for part in found.blocks}
    assert sum(part.share for part in found.blocks) == pytest.approx(1)
    assert profile.summarise().operations.keys() == {"fp32"}


def test_blocks_that_cannot_be_read(tmp_path):
    made = make_bundle(tmp_path / "tiny", members={"report.json": b'{"blocks": {"stem": 5}}'})
    with pytest.raises(BundleError, match=r"blocks\.stem is 5"):
        read_blocks(Bundle.open(made.path))
    assert read_blocks(make_bundle(tmp_path / "other")) == {}


def test_the_parts_of_an_answer(tmp_path):
    bundle = make_bundle(tmp_path / "tiny")
    images = [(source, "image") for source in bundle.golden().sources]
    with Predictor.load(bundle, backend="fake") as predictor:
        found = measure_stages(predictor, images, 5)
    assert {found.decode.count, found.resize.count, found.infer.count} == {5}
    assert min(found.decode.p50, found.resize.p50, found.infer.p50) > 0


def test_memory_is_read_where_the_system_tells_it(tmp_path, monkeypatch):
    status = tmp_path / "status"
    monkeypatch.setattr(memory_module, "STATUS", status)
    assert read_memory() is None
    status.write_text("VmHWM:\t  2000 kB\nVmRSS:\t  1000 kB\n")
    assert (read_memory().peak, read_memory().kept) == (2_048_000, 1_024_000)
    status.write_text("VmRSS:\t  1000 kB\n")
    assert read_memory() is None


@pytest.mark.parametrize(
    ("share", "seconds", "text"),
    [
        (0.5, 30.0, "about 30 s left"),
        (0.1, 20.0, "about 3 min 00 s left"),
        (0.01, 20.0, ""),
        (0.5, 1.0, ""),
        (1.0, 9.0, ""),
    ],
)
def test_the_time_that_is_left(share, seconds, text):
    assert describe_left(share, seconds) == text


@pytest.mark.parametrize(("error", "length"), [(1e-9, 0.0), (1e-8, 0.0), (1e-4, 0.5), (1.0, 1.0), (9.0, 1.0)])
def test_errors_of_layers_are_drawn_on_a_logarithmic_scale(error, length):
    assert find_length(error) == pytest.approx(length)


class Mistaken(Predictor):
    """Says the first class of everything."""

    def logits(self, batch: np.ndarray) -> np.ndarray:
        return np.eye(1, 3, dtype=np.float32).repeat(len(batch), 0)


def test_images_that_changed_are_kept_small_and_only_where_wanted(call, tmp_path):
    bundle, data = recorded_bundle(tmp_path / "tiny"), coloured_folder(tmp_path / "data")
    with Predictor.load(bundle) as right:
        wrong = Mistaken(right.session, bundle.preprocess, bundle.labels, batch=right.batch)
        given = {"data": ImageSet(str(data)), "candidate": wrong, "reference": right}
        found = run_verify(bundle, **given, flipped_images=4)
        assert run_verify(bundle, **given).flipped == ()
    assert len(found.flipped) == 4
    assert all(one.reference == one.label != one.bundle == 0 for one in found.flipped)
    assert all(one.name.count("/") == 1 for one in found.flipped)
    picture = Image.open(io.BytesIO(base64.b64decode(found.flipped[0].jpeg)))
    assert (picture.format, max(picture.size) <= SIDE, len(picture.getexif())) == ("JPEG", True, 0)
    assert "flipped" not in str(found.entry())
    figures = tmp_path / "figures.json"
    assert call(verify.main, bundle.path, "--data", data, "-q", "--figures", figures)[0] == 0
    assert read_reported(figures)[0].subject.data.images == 9
