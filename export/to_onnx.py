"""PyTorch -> ONNX -> onnxsim, each result compared with PyTorch before the next step may start."""

from __future__ import annotations

import ast
import contextlib
import functools
import io
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import onnx
import onnx_ir as ir
import onnxsim
import torch
from torch import nn

from cmt_edge.calib.graph import (
    add_constant,
    declare_weights,
    find_readers,
    make_node,
    open_view,
    read_array,
    write_model,
)
from cmt_edge.calib.groups import MODULE
from cmt_edge.calib.running import Run, lying_in_file, open_graph
from cmt_edge.cmt import FeatureMaps
from cmt_edge.cmt.outputs import TwoLabels
from cmt_edge.deploy.bundle import LOGITS
from cmt_edge.deploy.errors import (
    CmtEdgeError,
    InputError,
    ParityError,
    StepError,
)
from cmt_edge.deploy.report import format_differences
from cmt_edge.deploy.signals import raise_swallowed, unwound_by_signals

from .refusals import explaining, explaining_types, find_counting_line

INPUT = "input"
"""The name of the graph's input."""

BATCH_DIM = "batch"
"""The name of an open batch dimension."""

GRAPH_ATOL = 1e-4
"""The allowed difference of a float32 graph's output, relative to the largest value of the reference, which
counts as at least 1."""

FUSE_ATOL = 1e-5
"""The allowed difference that fusing makes, in the same unit as :data:`GRAPH_ATOL`."""

UNTYPED = ("CastLike", "SplitToSequence")
"""What torch.onnx writes for a conv without a bias (zeros "like" its input, made at every inference) and for
``split`` and ``chunk``.

onnxsim leaves them, and the batch norms behind such convs; torch.onnx's own optimizer replaces them.
Rewritten families have neither.
"""

UNWANTED = (
    "fuse_matmul_add_bias_into_gemm",
    "fuse_matmul_add_bias_into_gemm_batched",
    "fuse_qkv",
)
"""Passes of onnxsim that are left out. A ``Gemm`` needs its tokens flattened, and OpenVINO copies a
tensor that is read both flattened and as a map. Linears of one tensor that become one product and a ``Split``
lose their biases, which runtimes add within a product, and the parts are copied (docs/notes/int8.md)."""

CONTROLS = re.compile(r"\x1b\[[0-9;]*m")
"""Colours in third-party messages."""

COMPILER_FOLDER = "TORCHINDUCTOR_CACHE_DIR"
"""The environment variable that names the folder of PyTorch's compiler."""

TRACED_BATCH = 13
"""The batch size of a trace. Models do not use this size themselves, so that the batch is recognised in the
graph's shapes."""

OTHER_BATCH = 2
"""The batch size on which a graph is compared with its model."""


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
    (:data:`cmt_edge.calib.groups.MODULE`), until :func:`set_batch`.

    Args:
        model: in eval mode.
        img_size: height and width of its images.
        opset: of ONNX.
        outputs: names of what it returns.
        check: raises ``ParityError`` if a graph does not answer as ``model`` on a batch whose size is not
            :data:`TRACED_BATCH`; default: on two images made here.

    Raises:
        StepError: torch.onnx or onnx.checker refuses the model.
        InputError: the model uses what no graph can hold, see :mod:`cmt_edge.export.refusals`.
        ParityError: ``check`` refused the graph.
    """
    check = check or (lambda graph: _require_same(model, graph, img_size))
    # A model may build its shapes in another way.
    with contextlib.suppress(StepError, ParityError, InputError):
        graph = _free_batch_size(trace(model, img_size, opset, outputs, TRACED_BATCH))
        check(graph)
        return graph
    graph = trace(model, img_size, opset, outputs, None)
    example = torch.zeros(OTHER_BATCH, 3, img_size, img_size)
    with explaining_types(model, example):
        check_graph("export to ONNX", graph)
        _require_any_batch(graph, model, example)
        check(graph)
    return graph


def _require_any_batch(
    graph: onnx.ModelProto,
    model: nn.Module,
    example: torch.Tensor,
) -> None:
    """Raise :class:`InputError` where the tracing has fixed the batch size; it names the line of the user's
    code that counts the images ``example``, where one does."""
    size = graph.graph.input[0].type.tensor_type.shape.dim[0].dim_value
    if size:
        raise InputError(
            "the model's code fixes the batch size while it is traced",
            where=find_counting_line(model, example),
            why=f"traced with {size} images, the graph takes {size} images only",
            remedy="take the batch size from x.shape[0], not from len(x), int(...) or a number; compute on"
            " the whole batch, not in a loop over its images",
        )


def _require_same(model: nn.Module, graph: onnx.ModelProto, img_size: int) -> float:
    """The largest difference from ``model`` on two images; raises :class:`ParityError` beyond
    :data:`GRAPH_ATOL`."""
    images = _make_waves(OTHER_BATCH, img_size)
    with torch.inference_mode():
        given = model(images)
    outputs = (given,) if isinstance(given, torch.Tensor) else given
    expected = [output.numpy() for output in outputs]
    return require_parity(
        "export to ONNX",
        compute_outputs(graph, images.numpy(), "export to ONNX"),
        expected,
    )


def _make_waves(count: int, img_size: int) -> torch.Tensor:
    """Images of which no two are alike, float32 ``(count, 3, S, S)``."""
    phases = torch.linspace(-2, 2, count * 3 * img_size**2)
    return phases.reshape(count, 3, img_size, img_size).sin()


def trace(
    model: nn.Module,
    img_size: int,
    opset: int,
    outputs: Sequence[str],
    batch: int | None,
) -> onnx.ModelProto:
    """What torch.onnx makes of ``model`` with a fixed batch size, or with a symbolic one (``None``)."""
    example = torch.zeros(batch or 2, 3, img_size, img_size)  # 2: a symbolic batch of 1 would be baked in
    with (
        guarded("export to ONNX"),
        _quiet(),
        torch.no_grad(),
        explaining(model, example),
    ):
        program = torch.onnx.export(
            model,
            (example,),
            dynamo=True,
            opset_version=opset,
            input_names=[INPUT],
            output_names=list(outputs),
            dynamic_shapes=None if batch else ({0: torch.export.Dim(BATCH_DIM)},),
            external_data=False,
            verbose=False,
            optimize=False,  # onnxsim does it faster
        )
        assert program is not None
        if any(node.op_type in UNTYPED for node in program.model.graph):
            _rename_clashes(program.model.graph)
            if batch == TRACED_BATCH:  # before it is folded into constants
                _free_batch(program.model.graph)
            program.optimize()
        return _strip_metadata(
            program.model_proto,
            "model." if isinstance(model, (FeatureMaps, TwoLabels)) else "",
        )


def _free_batch_size(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of ``model``, traced with :data:`TRACED_BATCH`, in which every shape that begins with it is
    open.

    torch.onnx builds shapes by concatenating constants. Where only reshapes read one, the batch becomes -1;
    elsewhere (class tokens are expanded) it becomes the input's own batch size.
    """
    with open_view(model) as view:
        _free_batch(view.graph)
        result = write_model(view)
    return _set_batch_at_ends(result, 0)


def _free_batch(graph: ir.Graph) -> None:
    """See :func:`_free_batch_size`, in place."""
    made = [value for node in graph for value in node.outputs]
    for value in (graph.inputs[0], *made):
        value.shape = _open_batch(value.shape)
    shapes = [node for node in graph if node.op_type == "Concat" and _begins_with_batch(node)]
    if not shapes:
        return
    opened = add_constant(
        graph,
        "open",
        np.array([-1], np.int64),
    )
    size = make_node(
        "Shape",
        [graph.inputs[0]],
        "batch_size",
        "batch_size",
        {"end": 1, "start": 0},
    )
    graph.insert_before(graph[0], size)
    for node in shapes:
        node.replace_input_with(0, opened if _is_reshape_only(node) else size.outputs[0])


def _open_batch(shape: ir.Shape | None) -> ir.Shape | None:
    """A shape with a symbol in place of the traced batch, which optimizers would take for a constant."""
    if shape is None or len(shape) == 0 or shape[0] != TRACED_BATCH:
        return shape
    return ir.Shape([BATCH_DIM, *shape.dims[1:]])


def _begins_with_batch(concat: ir.Node) -> bool:
    """Whether it makes a constant shape of which the first dimension is the traced batch."""
    parts = [_read_integers(value) for value in concat.inputs]
    return all(part is not None for part in parts) and _join(parts)[0] == TRACED_BATCH


def _is_reshape_only(concat: ir.Node) -> bool:
    """Whether only reshapes read the shape, and no other dimension of it is open."""
    readers = {node.op_type for node in find_readers(concat.outputs[0])}
    parts = [_read_integers(value) for value in concat.inputs]
    return readers == {"Reshape"} and -1 not in _join(parts)


def _join(parts: Sequence[np.ndarray | None]) -> np.ndarray:
    return np.concatenate([part for part in parts if part is not None])


def _read_integers(value: ir.Value | None) -> np.ndarray | None:
    """The value of an int64 initializer or of a ``Constant`` node, with at least one dimension."""
    array = read_array(value)
    if array is None or (value is not None and value.is_initializer() and array.dtype != np.int64):
        return None
    return np.atleast_1d(array)


def _rename_clashes(graph: ir.Graph) -> None:
    """Give initializers other names where an operation's result has the same one: torch.onnx names results
    after operations, and a user's buffer may be called ``index`` too."""
    made = {value.name for node in graph for value in node.outputs}
    for name in [name for name in graph.initializers if name in made]:
        value = graph.initializers.pop(name)
        value.name = f"{name}.buffer"
        graph.register_initializer(value)


def simplify(graph: onnx.ModelProto) -> onnx.ModelProto:
    """``graph`` after onnxsim: constants folded, redundant operations gone.

    onnxsim goes on where a signal interrupts what it calls in Python, with constants that are not folded; the
    signal is raised when it is done.
    """
    with (
        unwound_by_signals(interrupt=True),
        guarded("simplify"),
        _quiet(),
        lying_in_file(graph) as path,
    ):
        simplified, ok = onnxsim.simplify(path or graph, skipped_optimizers=list(UNWANTED))
        raise_swallowed()
        if not ok:
            raise StepError(
                "step 'simplify' failed: onnxsim's own check did not pass",
                remedy="report the model",
            )
    return check_graph("simplify", _restore_labels(_strip_metadata(simplified), graph))


def set_batch(graph: onnx.ModelProto, batch: int) -> onnx.ModelProto:
    """A copy whose input and outputs have a fixed batch size; ``0`` keeps it dynamic. Names of modules are
    left out.

    Nothing else in the graph depends on the batch: reshapes leave it to -1.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(graph)
    for node in copy.graph.node:
        del node.metadata_props[:]
    return _set_batch_at_ends(copy, batch)


def _set_batch_at_ends(model: onnx.ModelProto, batch: int) -> onnx.ModelProto:
    """``model``, in place, with the batch size of its input and outputs set, and no shapes of what lies
    between."""
    del model.graph.value_info[:]
    for value in (model.graph.input[0], *model.graph.output):
        dim = value.type.tensor_type.shape.dim[0]
        if batch:
            dim.dim_value = batch
        else:
            dim.dim_param = BATCH_DIM
    return check_graph("set the batch size", model)


def check_graph(step: str, graph: onnx.ModelProto) -> onnx.ModelProto:
    """``graph`` if ``onnx.checker`` accepts it, with shape inference.

    Large weights are checked one by one, and the rest without them: the checker copies what it gets twice.
    """
    with guarded(step):
        onnx.checker.check_model(declare_weights(graph), full_check=True)
        for tensor in graph.graph.initializer:
            onnx.checker.check_tensor(tensor)
    return graph


def compute_outputs(
    graph: onnx.ModelProto,
    batch: np.ndarray,
    step: str,
) -> list[np.ndarray]:
    """Run ``graph`` in ONNX Runtime: float32 ``(N, 3, S, S)`` -> every output, ``(N, ...)``."""
    return run_graph(graph, step)(batch)


def run_graph(graph: onnx.ModelProto, step: str) -> Run:
    """``graph``, opened in ONNX Runtime: a function from a batch, float32 ``(N, 3, S, S)``, to all
    outputs.

    Raises:
        StepError: ONNX Runtime cannot open the graph, or, when the function is called, run it.
    """
    return open_graph(graph, functools.partial(guarded, step))


def require_parity(
    step: str,
    ours: Sequence[np.ndarray],
    reference: Sequence[np.ndarray],
    atol: float = GRAPH_ATOL,
) -> float:
    """The largest difference of any output; raises :class:`ParityError` with the step's name beyond
    ``atol``."""
    pairs = zip(ours, reference, strict=True)
    differences = [_find_largest_difference(found, expected) for found, expected in pairs]
    for i, (found, expected) in enumerate(zip(differences, reference, strict=True)):
        allowed = atol * max(1.0, float(np.abs(expected).max()))
        if not found <= allowed:
            what = "the logits" if len(reference) == 1 else f"feature map {i + 1}"
            shown, limit = format_differences(found, allowed)
            raise ParityError(
                f"step '{step}' changed {what} by {shown}, allowed are {limit}",
                remedy="nothing was written; report the model and what `pip freeze` prints",
            )
    return max(differences)


def _find_largest_difference(ours: np.ndarray, reference: np.ndarray) -> float:
    """Infinite where ``ours`` is not finite."""
    if not np.isfinite(ours).all():
        return float("inf")
    return float(np.abs(ours - reference).max())


@contextlib.contextmanager
def without_compiler_folder() -> Iterator[None]:
    """Keep PyTorch from making the folder of its compiler's cache among the temporary files.

    PyTorch asks where that folder is when it traces a model or counts its products, and would fail where it
    cannot be made, although nothing is compiled. It is therefore told of a folder that always exists, unless
    the user has named one.
    """
    if COMPILER_FOLDER in os.environ:
        yield
        return
    os.environ[COMPILER_FOLDER] = os.path.dirname(torch.__file__)
    try:
        yield
    finally:
        os.environ.pop(COMPILER_FOLDER, None)


@contextlib.contextmanager
def guarded(step: str) -> Iterator[None]:
    """Third-party failures inside ``step`` become one typed error."""
    try:
        yield
    except CmtEdgeError:
        raise
    except Exception as exc:
        text = CONTROLS.sub("", str(exc)).strip().splitlines()
        raise StepError(
            f"step '{step}' failed",
            why=f"{type(exc).__name__}: {text[0] if text else ''}",
            remedy="see the trace with -v and report the model",
        ) from exc


def _strip_metadata(graph: onnx.ModelProto, wrapper: str = "") -> onnx.ModelProto:
    """Without doc strings and metadata, which name files of the exporting machine; of the latter only module
    names stay.

    They begin inside ``wrapper``, a prefix of all of them.
    """
    del graph.metadata_props[:], graph.graph.metadata_props[:]
    graph.doc_string = graph.graph.doc_string = ""
    graph.producer_name, graph.producer_version = "cmt-edge", ""
    for node in graph.graph.node:
        module = _find_module(node)
        del node.metadata_props[:]
        node.doc_string = ""
        if module:
            node.metadata_props.add(key=MODULE, value=module.removeprefix(wrapper))
    for value in (
        *graph.graph.input,
        *graph.graph.output,
        *graph.graph.value_info,
    ):
        del value.metadata_props[:]
    return graph


def _find_module(node: onnx.NodeProto) -> str | None:
    """Path of the module whose ``forward`` made ``node``, as torch.onnx recorded it; ``None`` where it is not
    known."""
    known: dict[str, str] = {entry.key: entry.value for entry in node.metadata_props}
    if MODULE in known:
        return known[MODULE]
    try:  # a list of nested modules' paths, '' for the model, and at last the operation
        scopes = ast.literal_eval(known.get("pkg.torch.onnx.name_scopes", "[]"))
    except (ValueError, SyntaxError):
        return None
    is_inside = len(scopes) > 1 and scopes[0] == ""
    return str(scopes[-2]) if is_inside else None


def _restore_labels(simplified: onnx.ModelProto, traced: onnx.ModelProto) -> onnx.ModelProto:
    """``simplified`` with module names on operations that onnxsim made too: the name of what reads their
    result first."""
    known = {
        output: module
        for node in traced.graph.node
        if (module := _find_module(node))
        for output in node.output
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
    """Exporter chatter off standard output, standard error and the log; errors still raise.

    torch.export prints the whole graph to standard error where a model branches on values of the image.
    """
    loggers = [
        logging.getLogger(name)
        for name in (
            "torch.fx",
            "torch.fx.experimental.symbolic_shapes",
            "torch.onnx",
            "torch.onnx._internal.exporter._registration",
            "onnxscript",
            "onnx_ir",
        )
    ]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
