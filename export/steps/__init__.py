"""The steps of an export, each a function from values to values.

:mod:`cmt_edge.export.pipeline` puts them in order, and :mod:`cmt_edge.export.auto` uses some of them to make
its candidates. A step that changes the model compares its result with the untouched PyTorch reference and
raises :class:`~cmt_edge.deploy.errors.ParityError` beyond what is allowed.

In the order of an export, they are in ``reference``, ``images``, ``graph``, ``blocks``, ``bundle`` (with
``notes`` on the checkpoint) and ``gate``; ``cluster`` opens what some of them run on. Steps of TensorRT alone
are in :mod:`cmt_edge.export.trt`, so that other exports do not import TensorRT's side."""

from .blocks import find_blocks
from .bundle import measure_bundle, verify_bundle, write_files
from .cluster import check_cluster, make_statistics, make_waiting, open_cluster
from .decoding import compare_decoding, is_reduced
from .gate import SERVED_HERE, SecondOpinion, ask_other_runtime, require_passed
from .graph import (
    Differences,
    calibrate_graph,
    choose_graph,
    compare_batch_sizes,
    compare_simplified,
    fuse_model,
    measure_ranges,
    observe_ranges,
    simplify_graph,
    trace_model,
)
from .images import OBSERVED_IMAGES, choose_images, count_synthetic, make_images
from .notes import write_notes_on_checkpoint
from .reference import (
    GOLDEN_IMAGES,
    Evaluation,
    Reference,
    make_reference,
    match_evaluation,
    open_labelled,
)

__all__ = [
    "GOLDEN_IMAGES",
    "OBSERVED_IMAGES",
    "SERVED_HERE",
    "Differences",
    "Evaluation",
    "Reference",
    "SecondOpinion",
    "ask_other_runtime",
    "calibrate_graph",
    "check_cluster",
    "choose_graph",
    "choose_images",
    "compare_batch_sizes",
    "compare_decoding",
    "compare_simplified",
    "count_synthetic",
    "find_blocks",
    "fuse_model",
    "is_reduced",
    "make_images",
    "make_reference",
    "make_statistics",
    "make_waiting",
    "match_evaluation",
    "measure_bundle",
    "measure_ranges",
    "observe_ranges",
    "open_cluster",
    "open_labelled",
    "require_passed",
    "simplify_graph",
    "trace_model",
    "verify_bundle",
    "write_files",
    "write_notes_on_checkpoint",
]
