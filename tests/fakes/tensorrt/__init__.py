"""A TensorRT whose engines are ONNX Runtime sessions on the fake CUDA device: the whole of ``cmt-build`` runs
on it.

It offers only names that all real versions have (a test holds it to ``tests/data/tensorrt_names.json``).
``FAKE_TRT`` makes it fail: ``parser_error``, ``no_memory``, ``nothing``, ``crash``, ``killed``, ``slow``,
``float_engine``, ``wrong_logits``, ``no_context``, ``no_inspection``, ``no_types``, ``crash_at_end``.
``FAKE_TRT_VERSION`` is its version; from 11 on the inspection has the newer layout.
"""

from __future__ import annotations

import atexit
import ctypes
import json
import os
import signal
import sys
import time
from enum import IntEnum

import numpy as np
import onnx
import onnxruntime as ort
from cuda.bindings import runtime as _cuda
from onnx import TensorProto, shape_inference

__version__ = os.environ.get("FAKE_TRT_VERSION", "10.3.0")
_MAGIC, _TIMINGS = b"FAKEPLAN", b"FAKETIMINGS"


def _mode() -> str:
    return os.environ.get("FAKE_TRT", "")


def _enum(name: str, members: str) -> type[IntEnum]:
    return IntEnum(name, members.split(), start=0)


DataType = _enum("DataType", "FLOAT HALF INT8 INT32 BOOL UINT8")
TensorIOMode = _enum("TensorIOMode", "NONE INPUT OUTPUT")
MemoryPoolType = _enum("MemoryPoolType", "WORKSPACE")
NetworkDefinitionCreationFlag = IntEnum(
    "NetworkDefinitionCreationFlag", {"STRONGLY_TYPED": 0 if __version__ > "11" else 1}
)
ProfilingVerbosity = _enum("ProfilingVerbosity", "LAYER_NAMES_ONLY NONE DETAILED")
LayerInformationFormat = _enum("LayerInformationFormat", "ONELINE JSON")
BuilderFlag = IntEnum("BuilderFlag", {"TF32": 6})


class ILogger:
    def log(self, severity, message):
        raise NotImplementedError


class Logger(ILogger):
    Severity = _enum("Severity", "INTERNAL_ERROR ERROR WARNING INFO VERBOSE")


class IProgressMonitor:
    pass


class IProfiler:
    pass


class IHostMemory(bytes):
    @property
    def nbytes(self):
        return len(self)


class ITimingCache:
    def __init__(self, blob):
        self._blob = blob

    def serialize(self):
        return IHostMemory(self._blob + b"+")


class ITensor:
    def __init__(self, name):
        self.name = name


class INetworkDefinition:
    def __init__(self, flags):
        self._typed = bool(flags & 1 << int(NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        self._model = None

    @property
    def num_inputs(self):
        return len(self._model.graph.input)

    @property
    def num_outputs(self):
        return len(self._model.graph.output)

    def get_input(self, index):
        return ITensor(self._model.graph.input[index].name)


class ParserError:
    def desc(self):
        return "No importer registered for op: Fancy"


class OnnxParser:
    def __init__(self, network, logger):
        self._network = network

    num_errors = 1

    def parse(self, model, path=None):
        assert isinstance(model, bytes)
        self._network._model = onnx.load_from_string(model)
        return _mode() != "parser_error"

    def get_error(self, index):
        return ParserError()


class IOptimizationProfile:
    def __init__(self):
        self._shapes = {}

    def set_shape(self, input, min, opt, max):
        self._shapes[input] = [list(min), list(opt), list(max)]


class IBuilderConfig:
    builder_optimization_level = 3
    profiling_verbosity = ProfilingVerbosity.LAYER_NAMES_ONLY
    progress_monitor = None

    def __init__(self):
        self._flags, self._profiles = {BuilderFlag.TF32}, []

    def set_memory_pool_limit(self, pool, size):
        assert isinstance(size, int), "a float is rejected"
        self._workspace = size

    def set_flag(self, flag):
        self._flags.add(flag)

    def clear_flag(self, flag):
        self._flags.discard(flag)

    def create_timing_cache(self, blob):
        return ITimingCache(blob or _TIMINGS)

    def set_timing_cache(self, cache, ignore_mismatch):
        return cache._blob.startswith(_TIMINGS)

    def add_optimization_profile(self, profile):
        self._profiles.append(profile)


class Builder:
    def __init__(self, logger):
        self._logger = logger

    def create_network(self, flags):
        return INetworkDefinition(flags)

    def create_builder_config(self):
        return IBuilderConfig()

    def create_optimization_profile(self):
        return IOptimizationProfile()

    def build_serialized_network(self, network, config):
        monitor, mode = config.progress_monitor, _mode()
        if mode == "crash_at_end":
            atexit.register(os.abort)
        monitor.phase_start("Building Engine", None, 4)
        for step in range(4):
            monitor.phase_start("Tactics", "Building Engine", 1)
            time.sleep(5.0 if mode == "slow" else 0.0)
            monitor.step_complete("Tactics", 0)
            monitor.phase_finish("Tactics")
            monitor.step_complete("Building Engine", step)
        monitor.phase_finish("Building Engine")
        if mode == "crash":
            print("segmentation fault in tactic 0x1234", file=sys.stderr, flush=True)
            os.abort()
        if mode == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if mode == "no_memory":
            self._logger.log(
                Logger.Severity.ERROR, "Error Code 2: OutOfMemory (Requested size was 1073741824 bytes.)"
            )
        if mode in ("nothing", "no_memory"):
            return None
        self._logger.log(Logger.Severity.WARNING, "a weight was rounded")
        header = {
            "typed": network._typed,
            "tf32": BuilderFlag.TF32 in config._flags,
            "workspace": config._workspace,
            "level": config.builder_optimization_level,
            "detailed": int(config.profiling_verbosity) == 2,
            "profile": config._profiles[0]._shapes if config._profiles else None,
            "device": _cuda.current(),
            "stamp": time.time_ns(),
        }
        return IHostMemory(_MAGIC + json.dumps(header).encode() + b"\n" + network._model.SerializeToString())


class Runtime:
    def __init__(self, logger):
        self._logger = logger

    def deserialize_cuda_engine(self, plan):
        with open(os.environ.get("FAKE_TRT_TRACE", os.devnull), "a") as trace:
            trace.write("deserialized\n")
        if not plan.startswith(_MAGIC):
            self._logger.log(Logger.Severity.ERROR, "magic tag does not match")
            return None
        header, model = plan[len(_MAGIC) :].split(b"\n", 1)
        return ICudaEngine(json.loads(header), onnx.load_from_string(model))


class ICudaEngine:
    def __init__(self, header, model):
        self._header, self._model = header, model
        options = ort.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 3, 1
        self._session = ort.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        self._io = [model.graph.input[0], *model.graph.output]

    @property
    def num_io_tensors(self):
        return len(self._io)

    def get_tensor_name(self, index):
        return self._io[index].name

    def get_tensor_mode(self, name):
        return TensorIOMode.INPUT if name == self._io[0].name else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name):
        return DataType.FLOAT

    def get_tensor_profile_shape(self, name, profile_index):
        fixed = [d.dim_value for d in self._io[0].type.tensor_type.shape.dim]
        return (self._header["profile"] or {name: [fixed] * 3})[name]

    def get_tensor_shape(self, name):
        value = next(v for v in self._io if v.name == name)
        return tuple(d.dim_value or -1 for d in value.type.tensor_type.shape.dim)

    def create_execution_context(self):
        return None if _mode() == "no_context" else IExecutionContext(self)

    def create_engine_inspector(self):
        return EngineInspector(self)


class IExecutionContext:
    profiler = None

    def __init__(self, engine):
        self._engine, self._addresses, self._shape = engine, {}, None
        assert _cuda.current() == engine._header.get("device", 0), "the engine is for another GPU"

    def set_input_shape(self, name, shape):
        low, _, high = self._engine.get_tensor_profile_shape(name, 0)
        self._shape = tuple(shape)
        return all(a <= s <= b for a, s, b in zip(low, shape, high, strict=True))

    def get_tensor_shape(self, name):
        value = next(v for v in self._engine._io if v.name == name)
        return (self._shape[0], *(d.dim_value for d in value.type.tensor_type.shape.dim[1:]))

    def set_tensor_address(self, name, address):
        self._addresses[name] = address
        return True

    def execute_async_v3(self, stream_handle):
        _cuda.enqueue(stream_handle, self._compute)
        return True

    def _compute(self):
        source, *targets = (self._addresses[v.name] for v in self._engine._io)
        outputs = self._engine._session.run(
            None, {self._engine._io[0].name: _array(source, self._shape).copy()}
        )
        for target, output in zip(targets, outputs, strict=True):
            _array(target, output.shape)[...] = output + (5.0 if _mode() == "wrong_logits" else 0.0)
        if self.profiler is not None:
            for layer in _layers(self._engine._model):
                self.profiler.report_layer_time(layer["Name"], 0.01)


def _array(address, shape):
    count = int(np.prod(shape))
    return np.ctypeslib.as_array((ctypes.c_float * count).from_address(address)).reshape(shape)


class EngineInspector:
    execution_context = None

    def __init__(self, engine):
        self._engine = engine

    def get_engine_information(self, format):
        if not self._engine._header["detailed"] or _mode() == "no_inspection":
            return json.dumps({"Layers": [layer["Name"] for layer in _layers(self._engine._model)]})
        known = self.execution_context is not None and self.execution_context._shape
        found = _layers(self._engine._model)
        for tensor in (t for layer in found for t in layer["Inputs"] + layer["Outputs"]):
            if self._engine._header["profile"] and (not known or _mode() == "no_types"):
                tensor.update(
                    {key: "N/A due to dynamic shapes" for key in tensor if "ormat" in key or "type" in key}
                )
        names = [value.name for value in self._engine._io]
        ends = (
            {"I/O Tensors": [{"Name": n, "DataType": "Float"} for n in names]}
            if __version__ > "11"
            else {"Bindings": names}
        )
        return json.dumps({"Layers": found, **ends})


def _layers(model):
    """One layer an operation, without fusions."""
    graph = shape_inference.infer_shapes(model).graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.value_info, *graph.output)}
    sources = {o: n for n in graph.node for o in n.output}
    layers = []
    for node in graph.node:
        kinds = {
            "Cast": "Reformat",
            "QuantizeLinear": "Quantize",
            "DequantizeLinear": "Dequantize",
            "Reshape": "Shuffle",
            "Transpose": "Shuffle",
            "Flatten": "Shuffle",
            "Split": "NoOp",
            "Conv": "CaskConvolution",
            "Constant": "Constant",
        }
        fused = node.op_type in ("Conv", "Gemm", "MatMul") and all(
            _dequantized(i, sources) for i in node.input[:2]
        )
        inputs = [_tensor(n, TensorProto.INT8 if fused else types[n]) for n in node.input if n in types]
        outputs = [_tensor(n, types[n]) for n in node.output]
        layers.append(
            {
                "Name": node.name,
                "LayerType": kinds.get(node.op_type, "kgen"),
                "Inputs": inputs,
                "Outputs": outputs,
            }
        )
    return layers


def _dequantized(name, sources):
    while name in sources and sources[name].op_type in ("Reshape", "Transpose", "Split"):
        name = sources[name].input[0]
    return name in sources and sources[name].op_type == "DequantizeLinear"


def _tensor(name, kind):
    if _mode() == "float_engine":
        kind = TensorProto.FLOAT
    words = {
        TensorProto.FLOAT: ("Row major linear FP32", "Float"),
        TensorProto.FLOAT16: ("Row major linear FP16 format", "Half"),
        TensorProto.INT8: ("Thirty-two wide channel vectorized row major Int8 format", "Int8"),
    }
    long, short = words.get(kind, ("Row major linear Int64 format", "Int64"))
    types = (
        {"Format": "Row major linear", "Datatype": short} if __version__ > "11" else {"Format/Datatype": long}
    )
    return {"Name": name, "Location": "Device", "Dimensions": [], **types}
