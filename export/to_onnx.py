"""PyTorch -> ONNX -> onnxsim, each result compared with PyTorch before the next step may start."""

from __future__ import annotations

import ast
import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import onnx
import onnxsim
import torch
from onnx import helper, numpy_helper
from torch import nn

from cmt_edge.calib.groups import MODULE
from cmt_edge.cmt import FeatureMaps
from cmt_edge.deploy.bundle import LOGITS
from cmt_edge.deploy.errors import CmtEdgeError, ParityError, StepError

INPUT, BATCH = "input", "batch"
ATOL = 1e-4
"""Allowed difference of a float32 graph's output, relative to the largest value but at least absolute."""
FUSE_ATOL = 1e-5
UNTYPED = ("CastLike", "SplitToSequence")
"""What torch.onnx writes for a conv without a bias (zeros "like" its input, made at every inference) and for
``split`` and ``chunk``.

onnxsim leaves them, with the batch norms behind such convs; torch.onnx's own optimizer does not. Rewritten
families have neither.
"""


def export_onnx(
    model: nn.Module,
    img_size: int,
    opset: int,
    outputs: Sequence[str] = (LOGITS,),
    check: Callable[[onnx.ModelProto], object] | None = None,
) -> onnx.ModelProto:
    """Trace ``model``; the graph takes any batch size.

    Tracing with a fixed batch takes half the time of a symbolic one, so that is tried first, the batch freed
    afterwards and the graph compared with ``model`` on another batch size. The graph holds no stack traces or
    paths, so equal inputs give equal bytes; each node keeps the name of the module it comes from as metadata
    (:data:`cmt_edge.calib.groups.MODULE`), until :func:`with_batch`.

    Args:
        model: in eval mode.
        img_size: height and width of its images.
        opset: of ONNX.
        outputs: names of what it returns.
        check: raises ``ParityError`` if a graph does not answer as ``model`` on a batch whose size is not
            :data:`TRACED_BATCH`; default: on two images made here.

    Raises:
        StepError: torch.onnx or onnx.checker refuses the model.
        ParityError: ``check`` refused the graph.
    """
    check = check or (lambda graph: _require_same(model, graph, img_size))
    with contextlib.suppress(StepError, ParityError):  # a model may build its shapes in another way
        graph = _batch_freed(_traced(model, img_size, opset, outputs, TRACED_BATCH))
        check(graph)
        return graph
    graph = checked("export to ONNX", _traced(model, img_size, opset, outputs, None))
    check(graph)
    return graph


def _require_same(model: nn.Module, graph: onnx.ModelProto, img_size: int) -> float:
    """The largest difference from ``model`` on two images; raises :class:`ParityError` beyond
    :data:`ATOL`."""
    images = (
        torch.linspace(-2, 2, OTHER_BATCH * 3 * img_size**2).reshape(OTHER_BATCH, 3, img_size, img_size).sin()
    )
    with torch.inference_mode():
        given = model(images)
    expected = [v.numpy() for v in ((given,) if isinstance(given, torch.Tensor) else given)]
    return require_parity("export to ONNX", outputs_of(graph, images.numpy(), "export to ONNX"), expected)


FATAL_ONLY = 4
UNWANTED = ("fuse_matmul_add_bias_into_gemm", "fuse_matmul_add_bias_into_gemm_batched")
"""Passes of onnxsim that are left out: a ``Gemm`` needs its tokens flattened, and OpenVINO copies a tensor
that is read both so and as a map."""
TRACED_BATCH = 13
"""Not a size that models use themselves, so that it is known again in the graph's shapes."""
OTHER_BATCH = 2


def _traced(
    model: nn.Module, img_size: int, opset: int, outputs: Sequence[str], batch: int | None
) -> onnx.ModelProto:
    """What torch.onnx makes of ``model`` with a fixed batch size, or with a symbolic one (``None``)."""
    example = torch.zeros(batch or 2, 3, img_size, img_size)  # 2: a symbolic batch of 1 would be baked in
    with guarded("export to ONNX"), _quiet(), torch.no_grad():
        program = torch.onnx.export(
            model,
            (example,),
            dynamo=True,
            opset_version=opset,
            input_names=[INPUT],
            output_names=list(outputs),
            dynamic_shapes=None if batch else ({0: torch.export.Dim(BATCH)},),
            external_data=False,
            verbose=False,
            optimize=False,  # onnxsim does it faster
        )
        assert program is not None
        if any(node.op_type in UNTYPED for node in program.model_proto.graph.node):
            program.optimize()
        return _anonymous(program.model_proto, "model." if isinstance(model, FeatureMaps) else "")


def _batch_freed(model: onnx.ModelProto) -> onnx.ModelProto:
    """``model``, traced with :data:`TRACED_BATCH`, in place, with every shape that begins with it left open.

    torch.onnx builds shapes by concatenating constants. Where only reshapes read one, the batch becomes -1;
    elsewhere (class tokens are expanded) the input's own.
    """
    graph = model.graph
    constants = {
        i.name: numpy_helper.to_array(i) for i in graph.initializer if i.data_type == onnx.TensorProto.INT64
    }
    constants |= {n.output[0]: np.atleast_1d(_constant(n)) for n in graph.node if n.op_type == "Constant"}
    readers: dict[str, set[str]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, set()).add(node.op_type)
    for node in graph.node:
        if node.op_type == "Concat" and all(name in constants for name in node.input):
            shape = np.concatenate([np.atleast_1d(constants[name]) for name in node.input])
            if shape[0] == TRACED_BATCH:
                node.input[0] = (
                    "open" if readers.get(node.output[0]) == {"Reshape"} and -1 not in shape else "batch_size"
                )
    graph.initializer.append(numpy_helper.from_array(np.array([-1], np.int64), "open"))
    graph.node.insert(0, helper.make_node("Shape", [INPUT], ["batch_size"], "batch_size", start=0, end=1))
    return _with_ends(model, 0)


def _constant(node: onnx.NodeProto) -> np.ndarray:
    """The value of a ``Constant`` node, as an array."""
    value = helper.get_attribute_value(node.attribute[0])
    return numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else np.asarray(value)


def simplify(graph: onnx.ModelProto) -> onnx.ModelProto:
    """``graph`` after onnxsim: constants folded, redundant operations gone."""
    with guarded("simplify"), _quiet():
        simplified, ok = onnxsim.simplify(graph, skipped_optimizers=list(UNWANTED))
        if not ok:
            raise StepError(
                "step 'simplify' failed: onnxsim's own check did not pass", remedy="report the model"
            )
    return checked("simplify", _relabelled(_anonymous(simplified), graph))


def with_batch(graph: onnx.ModelProto, batch: int) -> onnx.ModelProto:
    """A copy whose input and outputs have a fixed batch size; ``0`` keeps it dynamic. Names of modules are
    left out.

    Nothing else in the graph depends on the batch: reshapes leave it to -1.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(graph)
    for node in copy.graph.node:
        del node.metadata_props[:]
    return _with_ends(copy, batch)


def _with_ends(model: onnx.ModelProto, batch: int) -> onnx.ModelProto:
    """``model``, in place, with the batch size of its input and outputs set, and no shapes of what lies
    between."""
    del model.graph.value_info[:]
    for value in (model.graph.input[0], *model.graph.output):
        dim = value.type.tensor_type.shape.dim[0]
        if batch:
            dim.dim_value = batch
        else:
            dim.dim_param = BATCH
    return checked("set the batch size", model)


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
    """``graph``, opened in ONNX Runtime: a function from a batch, float32 ``(N, 3, S, S)``, to all
    outputs."""
    name = graph.graph.input[0].name
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = FATAL_ONLY  # errors are raised
    with guarded(step):
        session = ort.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def run(batch: np.ndarray) -> list[np.ndarray]:
        with guarded(step):
            return session.run(None, {name: batch})

    return run


def require_parity(
    step: str, ours: Sequence[np.ndarray], reference: Sequence[np.ndarray], atol: float = ATOL
) -> float:
    """The largest difference of any output; raises :class:`ParityError` with the step's name beyond
    ``atol``."""
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
        raise StepError(
            f"step '{step}' failed",
            why=f"{type(exc).__name__}: {text[0] if text else ''}",
            remedy="see the trace with -v and report the model",
        ) from exc


def _anonymous(graph: onnx.ModelProto, wrapper: str = "") -> onnx.ModelProto:
    """Without doc strings and metadata, which name files of the exporting machine; of the latter only module
    names stay.

    They begin inside ``wrapper``, a prefix of all of them.
    """
    del graph.metadata_props[:], graph.graph.metadata_props[:]
    graph.doc_string = graph.graph.doc_string = ""
    graph.producer_name, graph.producer_version = "cmt-edge", ""
    for node in graph.graph.node:
        module = _module(node)
        del node.metadata_props[:]
        node.doc_string = ""
        if module:
            node.metadata_props.add(key=MODULE, value=module.removeprefix(wrapper))
    for value in (*graph.graph.input, *graph.graph.output, *graph.graph.value_info):
        del value.metadata_props[:]
    return graph


def _module(node: onnx.NodeProto) -> str | None:
    """Path of the module whose ``forward`` made ``node``, as torch.onnx recorded it; ``None`` where it is not
    known."""
    known = {p.key: p.value for p in node.metadata_props}
    if MODULE in known:
        return known[MODULE]
    try:  # a list of nested modules' paths, '' for the model, and at last the operation
        scopes = ast.literal_eval(known.get("pkg.torch.onnx.name_scopes", "[]"))
    except (ValueError, SyntaxError):
        return None
    return scopes[-2] if len(scopes) > 1 and scopes[0] == "" else None


def _relabelled(simplified: onnx.ModelProto, traced: onnx.ModelProto) -> onnx.ModelProto:
    """``simplified`` with module names on operations that onnxsim made too: the name of what reads their
    result first."""
    known = {
        output: module for node in traced.graph.node if (module := _module(node)) for output in node.output
    }
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
