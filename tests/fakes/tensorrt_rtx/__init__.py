"""A TensorRT for RTX on the fake CUDA device: the fake TensorRT with what the other product adds.

It builds with a GPU, as ``cmt-build`` does, and without one, as an export does, and lists its kernels in the
log. A context compiles the engine's kernels unless its runtime cache has them; each compilation is a line of
the file ``FAKE_RTX_TRACE``. Modes of ``FAKE_TRT`` besides those of the fake TensorRT: ``no_layers``,
``hungry``, ``other_driver`` and ``broken_cache`` (it refuses what was kept before, or raises).
"""

from __future__ import annotations

import os

import tensorrt as _base
from tensorrt import *  # noqa: F403
from tensorrt import IBuilderConfig as _Config
from tensorrt import Logger

__version__ = "1.7.1.116"

UNSERVED = (
    "IRuntime::deserializeCudaEngine: Error Code 6: API Usage Error (The engine cannot run on this GPU, which"
    " has compute capability 9.0. Supported compute capabilities: None. TensorRT-RTX does not support this"
    " compute capability, so the engine cannot be rebuilt for it. In throwUnlessComputeCapSupported at"
    " /_src/runtime/dispatch/runtime.cpp:84)"
)
"""What TensorRT for RTX 1.7.1.116 says on an H200."""
ComputeCapability = _base._enum("ComputeCapability", "NONE CURRENT SM75 SM80 SM86 SM89 SM120 SM121")


class IBuilderConfig(_Config):
    num_compute_capabilities = 0
    max_aux_streams = 7
    _workspace = None

    def __init__(self):
        super().__init__()
        self._capabilities = {}

    def set_compute_capability(self, capability, index):
        assert index < self.num_compute_capabilities
        self._capabilities[index] = capability.name


class IRuntimeCache:
    def __init__(self):
        self._known = set()

    def _head(self):
        return f"FAKEKERNELS {_base._mode() == 'other_driver'}"

    def deserialize(self, blob):
        if _base._mode() == "broken_cache":
            raise RuntimeError("the cache cannot be read")
        head, *known = blob.decode().split("\n")
        if head != self._head():
            return False
        self._known.update(known)
        return True

    def serialize(self):
        return _base.IHostMemory("\n".join([self._head(), *sorted(self._known)]).encode())


class IRuntimeConfig:
    def __init__(self):
        self._cache = None

    def create_runtime_cache(self):
        return IRuntimeCache()

    def set_runtime_cache(self, cache):
        self._cache = cache
        return True


class ICudaEngine(_base.ICudaEngine):
    def create_runtime_config(self):
        return IRuntimeConfig()

    def create_execution_context(self, runtime_config=None):
        known = set() if runtime_config is None else runtime_config._cache._known
        name = str(self._header.get("stamp", "engine"))
        if name not in known:
            known.add(name)
            with open(os.environ.get("FAKE_RTX_TRACE", os.devnull), "a") as trace:
                trace.write("compiled\n")
        return super().create_execution_context()


class Runtime(_base.Runtime):
    def deserialize_cuda_engine(self, plan):
        if os.environ.get("FAKE_TRT") == "unserved":
            self._logger.log(_base.Logger.Severity.ERROR, UNSERVED)
            return None
        engine = super().deserialize_cuda_engine(plan)
        return engine and ICudaEngine(engine._header, engine._model)


class Builder(_base.Builder):
    def create_builder_config(self):
        return IBuilderConfig()

    def build_serialized_network(self, network, config):
        if os.environ.get("FAKE_TRT") == "hungry":
            bytearray(1 << 31)
        plan = super().build_serialized_network(network, config)
        if plan is not None and os.environ.get("FAKE_TRT") != "no_layers":
            lines = [_line(node.name, node.op_type) for node in network._model.graph.node]
            self._logger.log(Logger.Severity.VERBOSE, "Layers:\n" + "\n".join(lines) + "\n\nBindings:\ninput")
        if plan is None:
            return None
        names = [config._capabilities[i] for i in range(config.num_compute_capabilities)]
        note = f'{{"compute": "{" ".join(names)}", "aux_streams": {config.max_aux_streams}, '
        return _base.IHostMemory(plan.replace(b"{", note.encode(), 1))


def _line(name, kind):
    tensor = "{ Name: x, Dimensions: [1,8], Strides: [8,1], Datatype: Half, Format: (Linear) Row major }"
    kind = "gemm" if kind == "MatMul" else "kgen"
    return (
        f"Name: {name}_myl0_0, LayerType: {kind}, Inputs: [ {tensor}], Constants: [], Outputs: [ {tensor}],"
        f" TacticName: , StreamId: 0, Metadata: [ONNX Layer: {name}]"
    )
