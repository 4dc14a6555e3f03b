"""ONNX Runtime: serves ``model.onnx`` of every bundle, on every platform that it has wheels for.

It runs on the CPU, and on the devices of :mod:`.providers` where their packages are installed.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from ..bundle import ONNX, Bundle
from ..bundle.sections import FLOAT32, ExecutedPrecision
from ..cores import count_cores
from ..errors import InputError, RuntimeMissingError
from .base import WARM_UP_RUNS, LoadOptions, Runtime, Session, make_open_error, make_run_error
from .described import GraphTensor, require_described
from .onnxruntime_cache import Job, can_keep, open_once
from .overflow import can_overflow
from .profile import NodeRun, Profile
from .provider_sessions import Offer, count_operators, find_offer, open_on
from .providers import CPU, Demand, parse_place, require_precision

CONVERSION_OPERATORS = {
    "QuantizeLinear",
    "DequantizeLinear",
    "Cast",
    "ReorderInput",
    "ReorderOutput",
}
"""Operators that only change the type or the memory layout of a tensor."""

TYPES = {"tensor(float)": FLOAT32}
"""ONNX Runtime's name of a type -> the manifest's."""

NAME = f"onnxruntime {ort.__version__}"
"""Name and version of the runtime."""

FORMAT = "session.load_model_format"
"""Setting that names the format of a model. Without it ONNX Runtime takes bytes for its own format where
their fifth to eighth are ``ORTM``, which may as well be the begin of a name in an ONNX file."""

EXACT_INT8 = "session.x64quantprecision"
"""Setting that makes int8 products exact where they can overflow. Elsewhere it would only cost time, as with
weights whose sums fit (:mod:`.pair_limits`)."""
KERNEL = "_kernel_time"
"""How the name of an event ends that is the kernel of a node."""
MICROSECONDS = 1e6
"""Those of a second; a profile counts in them."""

FATAL_ONLY = 4
"""ONNX Runtime's log level that hides warnings and errors. It writes them to standard error by itself, with
names of a graph that could steer a terminal; the exception that it raises says the same."""

_Recorded = tuple[list[dict[str, Any]], ort.InferenceSession, Offer | None]
"""The events of a profile, the session that made it, and the provider that ran it, ``None`` for the CPU's."""


class OnnxRuntimeSession(Session):
    """An ONNX file, or its bytes, on the CPU or on one device of a provider."""

    def __init__(
        self,
        model: Path | bytes,
        options: LoadOptions,
        precision: str = "fp32",
        fits_16_bits: bool = False,
        keeping: Bundle | None = None,
    ) -> None:
        """Open a graph; raises :class:`RuntimeMissingError` where the device cannot run all of it.

        Args:
            model: the file, or its content.
            options: how it is run.
            precision: the bundle's, which some providers must be told.
            fits_16_bits: whether int8 products are exact without :data:`EXACT_INT8`, as the manifest says.
            keeping: the bundle whose graph ``model`` is, if what the CPU optimises of it may be kept for the
                next start.
        """
        self._model = model if isinstance(model, bytes) else _find_form(model)
        self._where = None if isinstance(model, bytes) else str(model)
        self._place = parse_place(options.device)
        self._threads = options.threads or count_cores()
        self._widens = can_overflow() and not fits_16_bits
        if self._place is not None:
            unit = self._place.unit
            self._demand = Demand(unit, precision, options.threads)
            self.parallelism = 2 if options.throughput else 1  # one copies while the other computes
        elif options.throughput:  # one thread per inference, as many inferences as threads
            self.parallelism, self._threads = self._threads, 1
        self.device = CPU if self._place is None else str(self._place)
        if keeping is not None and self._place is None:
            found = open_once(Job(keeping, self._widens, self._make_options, self._open_on_cpu), self._model)
            offer, self.inference, self.is_from_cache = None, found.value, found.is_kept
        else:
            offer, self.inference = self._open()
        self.runtime = NAME if offer is None else f"{NAME}, {offer}"
        self.input_name: str = self.inference.get_inputs()[0].name

    def _open(self, profile_prefix: str | None = None) -> tuple[Offer | None, ort.InferenceSession]:
        """The graph on its device, and the provider that runs it where that is not the CPU's."""

        make_options = partial(self._make_options, profile_prefix)
        if self._place is not None:
            return open_on(self._place, self._model, make_options, self._demand, self._where)
        return None, self._open_on_cpu(self._model, make_options())

    def _make_options(self, profile_prefix: str | None = None) -> ort.SessionOptions:
        return _make_options(self._threads, profile_prefix, self._widens)

    def _open_on_cpu(self, model: str | bytes, options: ort.SessionOptions) -> ort.InferenceSession:
        try:
            return ort.InferenceSession(
                model,
                options,
                providers=["CPUExecutionProvider"],
                enable_fallback=0,
            )
        except Exception as exc:  # it has a dozen types of its own
            raise make_open_error(self._where, exc) from exc

    def run(self, batch: np.ndarray) -> list[np.ndarray]:
        return self._run(self.inference, batch)

    def _run(self, inference: ort.InferenceSession, batch: np.ndarray) -> list[np.ndarray]:
        try:
            outputs: Any = inference.run(None, {self.input_name: batch})
        except Exception as exc:
            raise make_run_error(self._where, exc) from exc
        return list(outputs)

    def executed(self, batch: np.ndarray, repeats: int = 10) -> ExecutedPrecision:
        events, session, offer = self._record(batch, repeats)
        if offer is None:
            return _make_profile(events).summarise()
        return _summarise_provider(events, session, offer)

    def profile(self, batch: np.ndarray, repeats: int = 10) -> Profile | None:
        if self._place is not None:
            return None  # the times of a provider are those of the host
        return _make_profile(self._record(batch, repeats)[0])

    def _record(self, batch: np.ndarray, repeats: int) -> _Recorded:
        """The events of a profile, the session that made it, and the provider that ran it."""
        with tempfile.TemporaryDirectory() as folder:
            offer, session = self._open(str(Path(folder) / "profile"))
            for _ in range(repeats + WARM_UP_RUNS):
                self._run(session, batch)
            events = json.loads(Path(session.end_profiling()).read_text())
        return events, session, offer

    def close(self) -> None:
        del self.inference


def _make_options(threads: int, profile_prefix: str | None, widens: bool) -> ort.SessionOptions:
    """Options of a session; one that gets ``profile_prefix`` writes a profile to a file of that name, and one
    that ``widens`` computes int8 products exactly by slower kernels."""
    options = ort.SessionOptions()
    options.log_severity_level = FATAL_ONLY
    options.add_session_config_entry(FORMAT, "ONNX")
    if widens:
        options.add_session_config_entry(EXACT_INT8, "1")
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    if profile_prefix:
        options.enable_profiling = True
        options.profile_file_prefix = profile_prefix
    return options


def _find_form(file: Path) -> str | bytes:
    """What ONNX Runtime takes for a file: its path, or its content where the path is no UTF-8.

    Raises :class:`BundleError` where the content cannot be read.
    """
    try:
        str(file).encode()
        return str(file)
    except UnicodeEncodeError:  # Linux allows any bytes in names, ONNX Runtime does not
        pass
    try:
        return file.read_bytes()
    except OSError as exc:
        raise make_open_error(file, exc) from exc


def _make_profile(events: list[dict[str, Any]]) -> Profile:
    """The kernels in the order of their first run, labelled by the types that they read; quantize and
    dequantize nodes count as conversions."""
    spent: defaultdict[str, float] = defaultdict(float)
    first: dict[str, dict[str, Any]] = {}
    for event in _list_kernels(events):
        first.setdefault(event["name"], event)
        spent[event["name"]] += event["dur"] / MICROSECONDS
    return Profile(
        tuple(_describe_kernel(event, spent[name]) for name, event in first.items()),
        "ONNX Runtime profile",
    )


def _describe_kernel(event: dict[str, Any], seconds: float) -> NodeRun:
    kind = event.get("args", {}).get("op_name", "")
    name = event["name"].removesuffix(KERNEL)
    return NodeRun(
        name=name,
        kind=kind,
        precision=_label_event(event),
        seconds=seconds,
        is_conversion=kind in CONVERSION_OPERATORS,
        sources=(name,),
    )


def _summarise_provider(
    events: list[dict[str, Any]],
    session: ort.InferenceSession,
    offer: Offer,
) -> ExecutedPrecision:
    """Count the precisions of the kernels whose types a provider tells; its times are those of the host.

    A provider that compiles shows a whole part of the graph as one kernel, whose inner types nobody knows.
    """
    name = offer.provider.name
    source = f"{offer} runs all {count_operators(session)[name].total()} nodes"
    kernels = _list_kernels(events)
    if any(event["name"].startswith(name) for event in kernels):
        return ExecutedPrecision(source=f"{source}; it compiled them and does not tell their precisions")
    nodes = {event["name"]: _label_event(event) for event in kernels}
    return ExecutedPrecision(operations=dict(Counter(nodes.values())), source=source)


def _list_kernels(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The events of a profile that are kernels of nodes."""
    return [event for event in events if event.get("cat") == "Node" and event["name"].endswith(KERNEL)]


def _label_event(event: dict[str, Any]) -> str:
    """The precision of a kernel, from the types of its inputs."""
    args = event.get("args", {})
    kind = args.get("op_name", "")
    types = {name for entry in args.get("input_type_shape", []) for name in entry}
    if kind not in CONVERSION_OPERATORS and types & {"int8", "uint8"}:
        return "int8"
    return "fp16" if "float16" in types else "fp32"


def _read_tensor(tensor: ort.NodeArg) -> GraphTensor:
    """An input or output as ONNX Runtime tells it; a dimension that is not fixed has a name or none."""
    shape = tuple(size if isinstance(size, int) else None for size in tensor.shape)
    return GraphTensor((tensor.name,), shape, TYPES.get(str(tensor.type), str(tensor.type)))


class OnnxRuntime(Runtime):
    """Reads ``model.onnx`` as it is, so that nothing has to be prepared."""

    def check(self, device: str | None = None) -> str:
        """Name and version of the runtime, and of the provider that serves ``device``."""
        place = parse_place(device)
        return NAME if place is None else f"{NAME}, {find_offer(place)}"

    def float_precision(self, precision: str, device: str | None = None) -> str:
        """As :meth:`Runtime.float_precision`; bf16 is refused, because there are no CPU kernels for it, and
        int8 on a device whose provider would compute it in float32."""
        if precision == "bf16":
            raise InputError(
                "ONNX Runtime has no bfloat16 kernels on the CPU, so this bundle cannot run as asked",
                remedy="open it with --backend openvino, or export an fp32 or int8 bundle",
            )
        place = parse_place(device)
        if place is not None:
            require_precision(place, precision)
        return super().float_precision(precision, device)

    def load(self, bundle: Bundle, options: LoadOptions) -> Session:
        """Open ``model.onnx`` of a bundle; raises :class:`BundleError` where it is another graph than the
        manifest describes, :class:`RuntimeMissingError` where the device cannot run all of it."""
        try:
            self.float_precision(bundle.manifest.precision, options.device)
        except InputError as exc:
            exc.where = str(bundle.path)
            raise
        session = OnnxRuntimeSession(
            bundle.file(ONNX),
            options,
            bundle.manifest.precision,
            bundle.manifest.fits_16_bits,
            keeping=bundle if options.cache and can_keep(bundle) else None,
        )
        require_described(
            bundle,
            ONNX,
            [_read_tensor(tensor) for tensor in session.inference.get_inputs()],
            [_read_tensor(tensor) for tensor in session.inference.get_outputs()],
        )
        return session

    def open_watched(self, bundle: Bundle, options: LoadOptions, tensors: Sequence[str]) -> Session:
        """As :meth:`Runtime.open_watched`; ONNX Runtime leaves a tensor that it gives out of its fusions."""
        try:
            from .watched_graph import add_outputs
        except ImportError as exc:
            raise RuntimeMissingError(
                "onnx is not installed, which shows tensors inside a graph",
                remedy='pip install "cmt-edge[export]"',
            ) from exc
        self.float_precision(bundle.manifest.precision, options.device)
        graph = add_outputs(bundle, tensors)
        return OnnxRuntimeSession(graph, options, bundle.manifest.precision, bundle.manifest.fits_16_bits)


RUNTIME = OnnxRuntime()
"""What the table of runtimes gives for ``"onnxruntime"``."""
