"""PyTorch -> ONNX -> onnxsim, each result compared with PyTorch before the next step may start."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import onnx
import onnxsim
import torch
from torch import nn

from deploy.bundle import LOGITS
from deploy.errors import CmtEdgeError, ParityError, StepError

INPUT, BATCH = "input", "batch"
ATOL = 1e-4
"""Allowed difference of a float32 graph's output, relative to the largest value but at least absolute."""
FUSE_ATOL = 1e-5
UNTYPED = ("CastLike", "SplitToSequence")
"""What torch.onnx writes for a conv without a bias (zeros "like" its input, made at every inference) and for ``split`` and ``chunk``.

onnxsim leaves them, with the batch norms behind such convs; torch.onnx's own optimizer does not. Rewritten families have neither.
"""


def export_onnx(model: nn.Module, img_size: int, opset: int, outputs: Sequence[str] = (LOGITS,)) -> onnx.ModelProto:
    """Trace ``model`` with a dynamic batch dimension; ``outputs`` names what it returns.

    The graph holds no stack traces or paths, so equal inputs give equal bytes.

    Raises:
        StepError: torch.onnx or onnx.checker refuses the model.
    """
    example = torch.zeros(2, 3, img_size, img_size)  # 2: a batch of 1 would be baked in
    with guarded("export to ONNX"), _quiet(), torch.no_grad():
        program = torch.onnx.export(
            model, (example,), dynamo=True, opset_version=opset, input_names=[INPUT], output_names=list(outputs),
            dynamic_shapes=({0: torch.export.Dim(BATCH)},), external_data=False, verbose=False,
            optimize=False,  # onnxsim does it faster
        )  # fmt: skip
        assert program is not None
        if any(node.op_type in UNTYPED for node in program.model_proto.graph.node):
            program.optimize()
        graph = program.model_proto
    return checked("export to ONNX", _anonymous(graph))


def simplify(graph: onnx.ModelProto) -> onnx.ModelProto:
    """``graph`` after onnxsim: constants folded, redundant operations gone."""
    with guarded("simplify"), _quiet():
        simplified, ok = onnxsim.simplify(graph)
        if not ok:
            raise StepError("step 'simplify' failed: onnxsim's own check did not pass", remedy="report the model")
    return checked("simplify", _anonymous(simplified))


def with_batch(graph: onnx.ModelProto, batch: int) -> onnx.ModelProto:
    """A copy whose input and outputs have a fixed batch size; ``0`` keeps it dynamic.

    Nothing else in the graph depends on the batch: reshapes leave it to -1.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(graph)
    del copy.graph.value_info[:]
    for value in (copy.graph.input[0], *copy.graph.output):
        dim = value.type.tensor_type.shape.dim[0]
        if batch:
            dim.dim_value = batch
        else:
            dim.dim_param = BATCH
    return checked("fix the batch size", copy)


def checked(step: str, graph: onnx.ModelProto) -> onnx.ModelProto:
    """``graph`` if ``onnx.checker`` accepts it, with shape inference."""
    with guarded(step):
        onnx.checker.check_model(graph, full_check=True)
    return graph


def outputs_of(graph: onnx.ModelProto, batch: np.ndarray, step: str) -> list[np.ndarray]:
    """Run ``graph`` in ONNX Runtime: float32 ``(N, 3, S, S)`` -> every output, ``(N, ...)``."""
    return run_graph(graph, step)(batch)


def logits_of(graph: onnx.ModelProto, batch: np.ndarray, step: str) -> np.ndarray:
    """The first of :func:`outputs_of`: ``(N, classes)`` of a classifier."""
    return outputs_of(graph, batch, step)[0]


def run_graph(graph: onnx.ModelProto, step: str) -> Callable[[np.ndarray], list[np.ndarray]]:
    """``graph``, opened in ONNX Runtime: a function from a batch, float32 ``(N, 3, S, S)``, to all outputs."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    with guarded(step):
        session = ort.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def run(batch: np.ndarray) -> list[np.ndarray]:
        with guarded(step):
            return session.run(None, {INPUT: batch})

    return run


def require_parity(step: str, ours: Sequence[np.ndarray], reference: Sequence[np.ndarray], atol: float = ATOL) -> float:
    """The largest difference of any output; raises :class:`ParityError` with the step's name beyond ``atol``."""
    differences = [_largest_difference(a, b) for a, b in zip(ours, reference, strict=True)]
    for i, (found, expected) in enumerate(zip(differences, reference, strict=True)):
        allowed = atol * max(1.0, float(np.abs(expected).max()))
        if not found <= allowed:
            what = "the logits" if len(reference) == 1 else f"feature map {i + 1}"
            raise ParityError(
                f"step '{step}' changed {what} by {found:.3g}, allowed are {allowed:.3g}",
                remedy="nothing was written; report the model and what `pip freeze` prints",
            )
    return max(differences)


def _largest_difference(ours: np.ndarray, reference: np.ndarray) -> float:
    """Infinite where ``ours`` is not finite."""
    return float(np.abs(ours - reference).max()) if np.isfinite(ours).all() else float("inf")


@contextlib.contextmanager
def guarded(step: str) -> Iterator[None]:
    """Third-party failures inside ``step`` become one typed error."""
    try:
        yield
    except CmtEdgeError:
        raise
    except Exception as exc:
        text = str(exc).strip().splitlines()
        raise StepError(f"step '{step}' failed", why=f"{type(exc).__name__}: {text[0] if text else ''}",
                        remedy="see the trace with -v and report the model") from exc  # fmt: skip


def _anonymous(graph: onnx.ModelProto) -> onnx.ModelProto:
    """Without metadata and doc strings: they name files of the exporting machine."""
    del graph.metadata_props[:], graph.graph.metadata_props[:]
    graph.doc_string = graph.graph.doc_string = ""
    graph.producer_name, graph.producer_version = "cmt-edge", ""
    for node in graph.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    for value in (*graph.graph.input, *graph.graph.output, *graph.graph.value_info):
        del value.metadata_props[:]
    return graph


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Exporter chatter off standard output and the log; errors still raise."""
    loggers = [
        logging.getLogger(name)
        for name in ("torch.onnx", "torch.onnx._internal.exporter._registration", "onnxscript", "onnx_ir")
    ]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
