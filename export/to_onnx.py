"""PyTorch -> ONNX -> onnxsim, each result compared with PyTorch before the next step may start."""

from __future__ import annotations

import ast
import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import onnx
import onnxsim
import torch
from torch import nn

from calib.groups import MODULE
from deploy.errors import CmtEdgeError, ParityError, StepError

INPUT, OUTPUT, BATCH = "input", "logits", "batch"
ATOL = 1e-4
"""Allowed logit difference of a float32 graph, relative to the largest logit but at least absolute."""
FUSE_ATOL = 1e-5


def export_onnx(model: nn.Module, img_size: int, opset: int) -> onnx.ModelProto:
    """Trace ``model`` with a dynamic batch dimension.

    The graph holds no stack traces or paths, so equal inputs give equal bytes; each node keeps the name of the module it comes
    from as metadata (:data:`calib.groups.MODULE`), until :func:`with_batch`.

    Raises:
        StepError: torch.onnx or onnx.checker refuses the model.
    """
    example = torch.zeros(2, 3, img_size, img_size)  # 2: a batch of 1 would be baked in
    with guarded("export to ONNX"), _quiet(), torch.no_grad():
        program = torch.onnx.export(
            model, (example,), dynamo=True, opset_version=opset, input_names=[INPUT], output_names=[OUTPUT],
            dynamic_shapes=({0: torch.export.Dim(BATCH)},), external_data=False, verbose=False,
            optimize=False,  # onnxsim does it faster
        )  # fmt: skip
        assert program is not None
        graph = program.model_proto
    return checked("export to ONNX", _anonymous(graph))


def simplify(graph: onnx.ModelProto) -> onnx.ModelProto:
    """``graph`` after onnxsim: constants folded, redundant operations gone."""
    with guarded("simplify"), _quiet():
        simplified, ok = onnxsim.simplify(graph)
        if not ok:
            raise StepError("step 'simplify' failed: onnxsim's own check did not pass", remedy="report the model")
    return checked("simplify", _relabelled(_anonymous(simplified), graph))


def with_batch(graph: onnx.ModelProto, batch: int) -> onnx.ModelProto:
    """A copy whose input and output have a fixed batch size; ``0`` keeps it dynamic. Names of modules are left out.

    Nothing else in the graph depends on the batch: reshapes leave it to -1.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(graph)
    del copy.graph.value_info[:]
    for node in copy.graph.node:
        del node.metadata_props[:]
    for value in (copy.graph.input[0], copy.graph.output[0]):
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


def logits_of(graph: onnx.ModelProto, batch: np.ndarray, step: str) -> np.ndarray:
    """Run ``graph`` in ONNX Runtime: float32 ``(N, 3, S, S)`` -> ``(N, classes)``."""
    return run_graph(graph, step)(batch)[0]


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


def require_parity(step: str, ours: np.ndarray, reference: np.ndarray, atol: float = ATOL) -> float:
    """The largest difference; raises :class:`ParityError` with the step's name beyond ``atol``."""
    allowed = atol * max(1.0, float(np.abs(reference).max()))
    difference = float(np.abs(ours - reference).max()) if np.isfinite(ours).all() else float("inf")
    if not difference <= allowed:
        raise ParityError(
            f"step '{step}' changed the logits by {difference:.3g}, allowed are {allowed:.3g}",
            remedy="nothing was written; report the model and what `pip freeze` prints",
        )
    return difference


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
    """Without doc strings and metadata, which name files of the exporting machine; of the latter only module names stay."""
    del graph.metadata_props[:], graph.graph.metadata_props[:]
    graph.doc_string = graph.graph.doc_string = ""
    graph.producer_name, graph.producer_version = "cmt-edge", ""
    for node in graph.graph.node:
        module = _module(node)
        del node.metadata_props[:]
        node.doc_string = ""
        if module:
            node.metadata_props.add(key=MODULE, value=module)
    for value in (*graph.graph.input, *graph.graph.output, *graph.graph.value_info):
        del value.metadata_props[:]
    return graph


def _module(node: onnx.NodeProto) -> str | None:
    """Path of the module whose ``forward`` made ``node``, as torch.onnx recorded it; ``None`` where it is not known."""
    known = {p.key: p.value for p in node.metadata_props}
    if MODULE in known:
        return known[MODULE]
    try:  # a list of nested modules' paths, '' for the model, and at last the operation
        scopes = ast.literal_eval(known.get("pkg.torch.onnx.name_scopes", "[]"))
    except (ValueError, SyntaxError):
        return None
    return scopes[-2] if len(scopes) > 1 and scopes[0] == "" else None


def _relabelled(simplified: onnx.ModelProto, traced: onnx.ModelProto) -> onnx.ModelProto:
    """``simplified`` with module names on operations that onnxsim made too: the name of what reads their result first."""
    known = {output: module for node in traced.graph.node if (module := _module(node)) for output in node.output}
    for node in reversed(simplified.graph.node):
        module = next((known[name] for name in node.output if name in known), None)
        del node.metadata_props[:]
        if module:
            node.metadata_props.add(key=MODULE, value=module)
            for name in node.input:
                known.setdefault(name, module)
    return simplified


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
