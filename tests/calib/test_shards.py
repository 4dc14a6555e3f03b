"""Calibration on a real cluster: the bytes of a serial run, whatever is killed meanwhile."""

from __future__ import annotations

import threading
import warnings

import pytest

from cmt_edge.calib import CalibrationSet, quantize
from cmt_edge.calib.generated import generate
from cmt_edge.calib.integer_layers import measure_conv_ranges
from cmt_edge.calib.statistics import Batches, LocalStatistics
from cmt_edge.deploy.errors import DataError, GateError, InputError
from helpers.calibration import SPEC
from helpers.images import coloured, folder_of

pytest.importorskip("ray", reason='needs the extra "ray"')
pytest.importorskip("pyarrow", reason='needs the extra "ray"')

from cmt_edge.calib import shards
from cmt_edge.calib.shards import ClusterStatistics
from cmt_edge.deploy.scale.cluster import KNOWN_WARNINGS, Cluster, connected
from helpers.cluster import two_nodes
from helpers.kinds import convert_folder
from helpers.shard_workers import DeadlyOnce, OtherRounding, Slow

pytestmark = [
    pytest.mark.slow,
    *(pytest.mark.filterwarnings(f"ignore:{message}") for message in KNOWN_WARNINGS),
]

SHARD_IMAGES = 4
"""Images of a shard in these tests."""
IMAGES = 3 * SHARD_IMAGES - 2
"""Calibration images: the last shard is not full."""


@pytest.fixture(scope="module")
def mark(tmp_path_factory):
    """A file that a worker makes before it ends itself."""
    return tmp_path_factory.mktemp("mark") / "killed"


@pytest.fixture(scope="module")
def nodes(mark):
    """A cluster of two nodes with a core each, which is connected to."""
    patch = pytest.MonkeyPatch()
    patch.setenv("CMT_EDGE_TEST_MARK", str(mark))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with two_nodes() as nodes, connected(nodes.address):
            yield nodes
    patch.undo()


@pytest.fixture
def cluster(nodes, monkeypatch):
    """The cluster, with small shards."""
    monkeypatch.setattr(shards, "SHARD_IMAGES", SHARD_IMAGES)
    return Cluster("unused, because there is a connection")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    folder_of(folder, {"any": generate(IMAGES + 2, SPEC.size)})
    return folder


@pytest.fixture(scope="module")
def chosen(photos) -> CalibrationSet:
    return CalibrationSet.choose(photos, IMAGES, SPEC)


@pytest.fixture(scope="module")
def expected(quantized, chosen):
    """What a serial run measures."""
    return measure_conv_ranges(quantized.model, LocalStatistics(Batches(chosen, SPEC, None)))


def serialize(graph, data, statistics) -> bytes:
    made = quantize(graph, data, SPEC, statistics=statistics)
    return made.model.SerializeToString(deterministic=True) + made.source.SerializeToString(
        deterministic=True
    )


def test_the_graph_is_that_of_a_serial_run(cluster, graph, chosen):
    reports = []
    statistics = ClusterStatistics(cluster, chosen, SPEC, progress=lambda *done: reports.append(done))
    assert serialize(graph, chosen, statistics) == serialize(graph, chosen, None)
    assert (IMAGES, IMAGES) in reports


def measure(cluster, quantized, chosen, workers=1, **options):
    """What ``workers`` measure; each takes seconds to start."""
    statistics = ClusterStatistics(cluster, chosen, SPEC, workers=workers, **options)
    return measure_conv_ranges(quantized.model, statistics)


def test_images_in_memory_are_sent(cluster, quantized, data):
    ours = measure(cluster, quantized, data)
    assert len(ours) > 10
    assert ours == measure_conv_ranges(quantized.model, LocalStatistics(Batches(data, SPEC, None)))


def test_a_killed_worker_changes_nothing(cluster, quantized, chosen, mark, expected):
    ours = measure(cluster, quantized, chosen, 2, worker=DeadlyOnce)
    assert mark.exists()
    assert ours == expected


@pytest.mark.parametrize("kind", ["url", "webdataset", "table"])
def test_workers_measure_the_images_of_shards_tables_and_urls(
    cluster, quantized, chosen, photos, tmp_path, expected, kind
):
    there = CalibrationSet.choose(convert_folder(photos, tmp_path / "there", kind), IMAGES, SPEC)
    assert there.digests == chosen.digests
    assert measure(cluster, quantized, there) == expected


def test_a_worker_that_rounds_otherwise_is_refused(cluster, graph, chosen):
    """Calibration measures the float graph first: in the int8 one, most of such differences are rounded
    away."""
    statistics = ClusterStatistics(cluster, chosen, SPEC, workers=1, worker=OtherRounding)
    with pytest.raises(GateError, match="measures other values") as caught:
        quantize(graph, chosen, SPEC, statistics=statistics)
    assert caught.value.exit_code == 1
    assert "--ray" in caught.value.remedy


def test_a_corrupt_image_is_named(cluster, quantized, tmp_path):
    names = [coloured("red", i) for i in range(SHARD_IMAGES + 2)]
    folder_of(tmp_path, {"red": names})
    chosen = CalibrationSet.choose(tmp_path, None, SPEC)
    victim = chosen.files.items[SHARD_IMAGES]
    (tmp_path / victim.name).write_bytes(names[0][:40])
    with pytest.raises(DataError) as caught:
        measure(cluster, quantized, chosen)
    assert victim.name in str(caught.value)


def test_another_image_under_the_same_name_is_refused(cluster, quantized, tmp_path):
    folder_of(tmp_path, {"red": [coloured("red", i) for i in range(SHARD_IMAGES + 2)]})
    chosen = CalibrationSet.choose(tmp_path, None, SPEC)
    victim = chosen.files.items[3]
    (tmp_path / victim.name).write_bytes(coloured("blue"))
    with pytest.raises(InputError, match="another one on a worker") as caught:
        measure(cluster, quantized, chosen)
    assert victim.name in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_node_that_goes_changes_nothing(nodes, cluster, quantized, chosen, expected):
    """The last test of this module: the node does not come back."""
    gone = threading.Event()

    def remove(done: int, total: int) -> None:
        if not gone.is_set():
            gone.set()
            nodes.remove_node(nodes.worker_nodes.copy().pop(), allow_graceful=False)

    ours = measure(cluster, quantized, chosen, 2, worker=Slow, progress=remove)
    assert gone.is_set()
    assert ours == expected
