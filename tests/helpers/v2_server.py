"""A small server of KServe's protocol around a bundle, on the loopback, made of tritonclient's own stubs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import service_pb2, service_pb2_grpc

from cmt_edge.deploy import Bundle, Predictor
from cmt_edge.deploy.bundle.sections import BATCH, TensorEntry

MODEL = "tiny"
"""The name under which the model is offered."""


@dataclass
class Behaviour:
    """What the server does; tests change it while it runs.

    Attributes:
        ready: whether the model is loaded.
        add: what is added to every answer.
        dtype: type of the answers.
        rows: how many rows are left out of every answer.
        columns: how many classes are left out of every answer.
        cut: how many bytes are left out of every answer, while its shape still counts them.
        inputs: what the server says the model's inputs are, in place of the truth.
        calls: how many batches it has answered.
    """

    ready: bool = True
    add: float = 0.0
    dtype: str = "FP32"
    rows: int = 0
    columns: int = 0
    cut: int = 0
    name: str = "test server"
    inputs: tuple[TensorEntry, ...] = ()
    calls: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


class _Servicer(service_pb2_grpc.GRPCInferenceServiceServicer):
    def __init__(self, bundle: Bundle, predictor: Predictor, behaviour: Behaviour) -> None:
        self._manifest, self._predictor, self._behaviour = bundle.manifest, predictor, behaviour

    def ServerMetadata(self, request: Any, context: Any) -> Any:
        return service_pb2.ServerMetadataResponse(name=self._behaviour.name, version="1.2")

    def ModelReady(self, request: Any, context: Any) -> Any:
        return service_pb2.ModelReadyResponse(ready=self._behaviour.ready)

    def ModelMetadata(self, request: Any, context: Any) -> Any:
        if request.name != MODEL:
            context.abort(grpc.StatusCode.NOT_FOUND, f"no model {request.name}\x1b[31m")
        told = service_pb2.ModelMetadataResponse(name=MODEL)
        told.inputs.extend(map(_describe, self._behaviour.inputs or (self._manifest.input,)))
        told.outputs.extend(map(_describe, self._manifest.outputs))
        return told

    def ModelInfer(self, request: Any, context: Any) -> Any:
        shape = tuple(request.inputs[0].shape)
        batch = np.frombuffer(request.raw_input_contents[0], np.float32).reshape(shape)
        answer = service_pb2.ModelInferResponse(model_name=MODEL)
        with self._behaviour.lock:
            self._behaviour.calls += 1
        names = [entry.name for entry in self._manifest.outputs]
        for name, values in zip(names, self._predictor.session.run(batch), strict=True):
            kept = values[self._behaviour.rows :, self._behaviour.columns :]
            given = np.ascontiguousarray(kept + np.float32(self._behaviour.add))
            answer.outputs.add(name=name, datatype=self._behaviour.dtype, shape=given.shape)
            data = given.tobytes()
            answer.raw_output_contents.append(data[: len(data) - self._behaviour.cut])
        return answer


def _describe(entry: TensorEntry) -> Any:
    shape = [-1 if size == BATCH else size for size in entry.shape]
    return service_pb2.ModelMetadataResponse.TensorMetadata(name=entry.name, datatype="FP32", shape=shape)


@contextmanager
def serving(bundle: Bundle, predictor: Predictor) -> Iterator[tuple[str, Behaviour]]:
    """The address of a running server as a device, and what it does."""
    behaviour = Behaviour()
    server = grpc.server(ThreadPoolExecutor(4))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(
        _Servicer(bundle, predictor, behaviour), server
    )
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}/{MODEL}", behaviour
    finally:
        server.stop(None).wait()
