"""A model in an inference server: the server runs a bundle's graph, we prepare images and read answers.

Triton, OpenVINO Model Server, MLServer and others speak this protocol. The device names the model:
``HOST:PORT/MODEL``, with ``/VERSION`` after it where the server has several; ``grpcs://`` before it encrypts.
Nothing is sent anywhere that the device does not name.

Source: KServe, "Open Inference Protocol (V2)", gRPC.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from importlib import metadata
from typing import Any

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # its own log of a call that fails, beside our message

import numpy as np
import tritonclient.grpc as client
from tritonclient.utils import InferenceServerException

from cmt_edge.startup import name_program

from ..bundle import Bundle
from ..bundle.sections import FLOAT32, ExecutedPrecision
from ..errors import BundleError, InputError, RuntimeMissingError
from ..escaping import escape_line
from .base import LoadOptions, Runtime, Session
from .described import GraphTensor, require_described

ADDRESS = re.compile(
    r"(?:(?P<scheme>grpcs?)://)?(?P<host>(?:\[[0-9a-fA-F:.]+\]|[^\s/:\[\]]+):[0-9]{1,5})"
    r"/(?P<model>[A-Za-z0-9][A-Za-z0-9_.-]*)(?:/(?P<version>[0-9]+))?"
)
"""How a device is written."""
LAST_PORT = 65535
"""The highest port of TCP; gRPC takes a higher one for another port."""
EXAMPLE = "--device localhost:8001/cmt_xs_int8_onnx"
"""What messages show as one."""
TIME_LIMIT_S = 60.0
"""Seconds that the server may take for one answer."""
SHOWN_CHARACTERS = 300
"""The largest number of characters of the server's own words that a message quotes."""
TYPES = {"FP32": FLOAT32}
"""The protocol's name of a type -> the manifest's."""
REMEDIES = {
    "NOT_FOUND": "compare name and version with those of the models that the server's log shows",
    "RESOURCE_EXHAUSTED": "give fewer images at once, or let the server take larger messages",
}
"""What gRPC calls a failed call -> what to do where it is clear what went wrong."""
CONFIGURATION = "model_configuration"
"""What Triton calls its extension of the protocol that tells a model's settings."""
PROTOCOL = "kserve v2"
"""What the runtime is called before a server has told its name."""


@dataclass(frozen=True)
class Address:
    """Where a model is.

    Attributes:
        host: name or number, with the port.
        model: name of the model.
        version: its version; empty for the newest.
        encrypted: whether the connection is.
    """

    host: str
    model: str
    version: str
    encrypted: bool

    def __str__(self) -> str:
        scheme = "grpcs://" if self.encrypted else ""
        return f"{scheme}{self.host}/{self.model}" + (f"/{self.version}" if self.version else "")


def parse_address(device: str | None) -> Address:
    """The address in the name of a device; raises :class:`InputError`."""
    found = ADDRESS.fullmatch(device or "")
    if found is None or not 0 < int(found["host"].rpartition(":")[2]) <= LAST_PORT:
        raise InputError(
            f"--device {device!r} names no model in a server" if device else "no server is named",
            remedy=f"give HOST:PORT/MODEL, the port being that of gRPC: {EXAMPLE}",
        )
    return Address(
        found["host"],
        found["model"],
        found["version"] or "",
        found["scheme"] == "grpcs",
    )


class ServerSession(Session):
    """A model in a server. Calls may overlap; the server decides how many run at once."""

    parallelism = 4

    def __init__(self, address: Address, bundle: Bundle) -> None:
        """Raises :class:`RuntimeMissingError` where no server answers or it lacks the model,
        :class:`BundleError` where its model is another one."""
        self._address = address
        self._rows = {entry.name: tuple(entry.shape[1:]) for entry in bundle.manifest.outputs}
        self._input = bundle.manifest.input.name
        self._client = client.InferenceServerClient(address.host, ssl=address.encrypted)
        self.device = str(address)
        try:
            told = _ask_server(self._client, address)
            self.runtime = _name_server(told)
            _require_model(self._client, address, bundle)
            tells = CONFIGURATION in told.extensions
            self._most = _read_largest_batch(self._client, address) if tells else 0
        except BaseException:
            self.close()
            raise

    def run(self, batch: np.ndarray) -> list[np.ndarray]:
        most = self._most
        if not most or len(batch) <= most:
            return self._ask(batch)
        parts = [self._ask(batch[start : start + most]) for start in range(0, len(batch), most)]
        return [np.concatenate(rows) for rows in zip(*parts, strict=True)]

    def _ask(self, batch: np.ndarray) -> list[np.ndarray]:
        """The server's answer to one request."""
        given = client.InferInput(self._input, list(batch.shape), "FP32")
        given.set_data_from_numpy(batch)
        wanted = [client.InferRequestedOutput(name) for name in self._rows]
        try:
            answer = self._client.infer(
                self._address.model,
                [given],
                self._address.version,
                wanted,
                client_timeout=TIME_LIMIT_S,
            )
        except InferenceServerException as exc:
            raise _make_server_error(
                self._address, "the server did not answer a batch of images", exc
            ) from exc
        return [self._read(answer, name, (len(batch), *row)) for name, row in self._rows.items()]

    def _read(self, answer: Any, name: str, shape: tuple[Any, ...]) -> np.ndarray:
        """One output of an answer: float32 of the ``shape`` that the manifest tells."""
        try:
            values = answer.as_numpy(name)
        except ValueError:  # fewer bytes, or more, than the shape beside them says
            values = None
        if values is None or values.dtype != np.float32 or values.shape != shape:
            found = "nothing usable" if values is None else f"{values.dtype} {values.shape}"
            raise RuntimeMissingError(
                f"the server answered {found} for {name!r}, expected float32 {shape}",
                where=self._address,
                remedy=f"serve the bundle that was given here: {name_program('serve-repo')}",
            )
        return np.array(values)  # the answer's own memory is read-only

    def executed(self, batch: np.ndarray, repeats: int = 10) -> ExecutedPrecision:
        return ExecutedPrecision(source=f"{self.runtime} does not tell what it ran")

    def close(self) -> None:
        self._client.close()


def _ask_server(server: Any, address: Address) -> Any:
    """What the server tells of itself."""
    try:
        return server.get_server_metadata(client_timeout=TIME_LIMIT_S)
    except InferenceServerException as exc:
        raise _make_server_error(address, "no inference server answers", exc) from exc


def _name_server(told: Any) -> str:
    """Name and version of the server."""
    return _shorten(f"{told.name} {told.version}".strip()) or PROTOCOL


def _require_model(server: Any, address: Address, bundle: Bundle) -> None:
    """Raise an error unless the server offers the graph that the manifest describes."""
    try:
        told = server.get_model_metadata(address.model, address.version, client_timeout=TIME_LIMIT_S)
        is_ready = server.is_model_ready(address.model, address.version, client_timeout=TIME_LIMIT_S)
    except InferenceServerException as exc:
        raise _make_server_error(address, "the server does not offer this model", exc) from exc
    if not is_ready:
        raise RuntimeMissingError(
            "the server has the model, and it is not ready",
            where=address,
            remedy="read the server's log: it tells why the model was not loaded",
        )
    try:
        require_described(
            bundle,
            str(address),
            [_read_tensor(tensor) for tensor in told.inputs],
            [_read_tensor(tensor) for tensor in told.outputs],
        )
    except BundleError as exc:
        raise RuntimeMissingError(
            "the server's model is not that of the bundle",
            where=address,
            why=exc.why,
            remedy=f"serve the bundle that was given here: {name_program('serve-repo')}; or name another"
            " model",
        ) from exc


def _read_largest_batch(server: Any, address: Address) -> int:
    """The largest batch that the server takes for a model; 0 where the graph's own size is the only one."""
    try:
        settings = server.get_model_config(address.model, address.version, client_timeout=TIME_LIMIT_S)
    except InferenceServerException as exc:
        raise _make_server_error(address, "the server does not tell the model's settings", exc) from exc
    return int(settings.config.max_batch_size)


def _read_tensor(tensor: Any) -> GraphTensor:
    """An input or output as the server tells it; -1 stands for a dimension that is not fixed."""
    shape = tuple(None if size < 0 else int(size) for size in tensor.shape)
    return GraphTensor((tensor.name,), shape, TYPES.get(tensor.datatype, _shorten(tensor.datatype)))


def _make_server_error(address: Address, what: str, exc: InferenceServerException) -> RuntimeMissingError:
    """The error for a call that the server did not answer."""
    status = str(exc.status() or "")
    return RuntimeMissingError(
        what,
        where=address,
        why=_shorten(f"{status} {exc.message() or ''}".strip()),
        remedy=REMEDIES.get(
            status.rpartition(".")[2],
            "look whether the server runs and what its log says; the port is that of gRPC, not of HTTP",
        ),
    )


def _shorten(words: str) -> str:
    """What a server said, in one line that steers no terminal."""
    return escape_line(words[:SHOWN_CHARACTERS])


class InferenceServers(Runtime):
    """Servers that speak the protocol."""

    def check(self, device: str | None = None) -> str:
        """Name and version of the server that ``device`` names, of the client where none is named.

        Raises :class:`RuntimeMissingError` where no server answers.
        """
        if device is None:
            return f"tritonclient {metadata.version('tritonclient')}"
        address = parse_address(device)
        server = client.InferenceServerClient(address.host, ssl=address.encrypted)
        try:
            return _name_server(_ask_server(server, address))
        finally:
            server.close()

    def load(self, bundle: Bundle, options: LoadOptions) -> Session:
        """Connect to the server that ``options.device`` names.

        Raises :class:`RuntimeMissingError` where no server answers, or its model is another one.
        """
        return ServerSession(parse_address(options.device), bundle)


RUNTIME = InferenceServers()
"""What the table of runtimes gives for ``"kserve"``."""
