"""A stand-in for ONNX Runtime with devices that this machine lacks: its sessions compute on the CPU, and tell
that a provider does."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import onnxruntime as real
import pytest
from onnxruntime.capi.onnxruntime_pybind11_state import Fail

from cmt_edge.deploy.backends import onnxruntime as backend
from cmt_edge.deploy.backends import provider_sessions

REFUSAL = (
    "[ONNXRuntimeError] : 1 : FAIL : This session contains graph nodes that are assigned to the default CPU"
    " EP, but fallback to CPU EP has been explicitly disabled by the user."
)
"""What ONNX Runtime 1.24 and 1.31 say."""


def make_device(provider: str, number: int = 0, **metadata: str) -> SimpleNamespace:
    """A device of a plug-in, as ``onnxruntime.get_ep_devices`` gives it."""
    virtual = {"is_virtual": metadata.pop("is_virtual")} if "is_virtual" in metadata else {}
    return SimpleNamespace(
        ep_name=provider,
        ep_metadata={"version": "7.1+build", **metadata},
        device=SimpleNamespace(metadata=virtual, type=SimpleNamespace(name="GPU")),
        number=number,
    )


@dataclass
class Machine:
    """What is installed, and how it behaves.

    Attributes:
        built_in: providers of ``onnxruntime`` itself.
        plugins: module of a plug-in -> the devices that registering its library brings.
        folder: where the libraries of the plug-ins are.
        left: kinds of operators that the provider leaves to the CPU.
        starts: whether a provider of ``onnxruntime`` itself starts; otherwise it is left out silently.
        error: raised instead of opening a graph on a provider.
        absent: numbers of devices that a provider of ``onnxruntime`` itself does not find.
        severity: level of the log for what belongs to no session.
        run_error: raised by each inference.
        heeds_strict: whether the setting that forbids the CPU is heeded.
        records: whether sessions record who runs what.
        compiles: whether the provider's profile shows one kernel for the whole graph.
        opened: for each session on a provider its name and its options, in order.
        entries: the further settings of these sessions, in order.
        registered: the libraries of plug-ins, in order.
    """

    built_in: tuple[str, ...] = ()
    plugins: dict[str, list[Any]] = field(default_factory=dict)
    folder: str = "/opt"
    left: frozenset[str] = frozenset()
    starts: bool = True
    error: Exception | None = None
    absent: tuple[str, ...] = ()
    severity: int | None = None
    run_error: Exception | None = None
    heeds_strict: bool = True
    records: bool = True
    compiles: bool = False
    opened: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    entries: list[dict[str, str]] = field(default_factory=list)
    registered: list[str] = field(default_factory=list)
    devices: list[Any] = field(default_factory=list)

    def register_execution_provider_library(self, name: str, library: str) -> None:
        if library in self.registered:
            raise Fail(f"EP library is already registered under {name}")
        self.registered.append(library)
        self.devices += self.plugins[Path(library).stem]

    def install(self, monkeypatch: pytest.MonkeyPatch) -> Machine:
        """Make this the ONNX Runtime of the backend."""
        module = ModuleType("onnxruntime")
        module.__dict__.update(
            __version__=real.__version__,
            InferenceSession=self._make_session_class(),
            NodeArg=real.NodeArg,
            SessionOptions=lambda: Options(),
            get_available_providers=lambda: [*self.built_in, "CPUExecutionProvider"],
            get_ep_devices=lambda: [make_device("CPUExecutionProvider"), *self.devices],
            preload_dlls=lambda: print("libcudnn.so.9 is not there"),
            set_default_logger_severity=lambda level: setattr(self, "severity", level),
            register_execution_provider_library=self.register_execution_provider_library,
        )
        for user in (backend, provider_sessions):
            monkeypatch.setattr(user, "ort", module)
        found = {
            name: SimpleNamespace(get_library_path=lambda name=name: f"{self.folder}/{name}.so")
            for name in self.plugins
        }
        monkeypatch.setattr(provider_sessions, "find_spec", found.get)
        monkeypatch.setattr(provider_sessions, "import_module", found.__getitem__)
        return self

    def _make_session_class(self) -> type:
        """A class, because the backend asks what its sessions can."""
        machine = self

        class Session(StandInSession):
            def __init__(self, model: Any, options: Options, **more: Any) -> None:
                super().__init__(machine, model, options, **more)

        if machine.records:
            Session.get_provider_graph_assignment_info = Session.list_assigned
        return Session


class Options:
    """Stands for ``SessionOptions``."""

    def __init__(self) -> None:
        self.real = real.SessionOptions()
        self.real.add_session_config_entry(provider_sessions.RECORD, "1")
        self.entries: dict[str, str] = {}
        self.chosen: tuple[str, dict[str, str]] | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("real", "entries", "chosen"):
            setattr(self.real, name, value)
        super().__setattr__(name, value)

    def add_session_config_entry(self, name: str, value: str) -> None:
        self.entries[name] = value

    def add_provider_for_devices(self, devices: list[Any], settings: dict[str, str]) -> None:
        (device,) = devices
        self.chosen = (device.ep_name, {**settings, "number": str(device.number)})


class StandInSession:
    """Stands for ``InferenceSession``."""

    def __init__(
        self,
        machine: Machine,
        model: Any,
        options: Options,
        *,
        providers: Any = (),
        enable_fallback: int,
    ) -> None:
        assert enable_fallback == 0, "ONNX Runtime would repeat on the CPU what fails"
        self.machine = machine
        chosen = options.chosen or next((entry for entry in providers if isinstance(entry, tuple)), None)
        self.real = real.InferenceSession(model, options.real, providers=["CPUExecutionProvider"])
        self.name = None
        if chosen is None:
            return
        machine.opened.append(chosen)
        machine.entries.append(options.entries)
        if machine.error is not None:
            raise machine.error
        if chosen[1].get("device_id") in machine.absent:
            raise Fail("provider_options_utils.h:187 Parse Failed")
        self.name = chosen[0] if machine.starts else None
        strict = options.entries.get(provider_sessions.STRICT) == "1"
        if strict and machine.heeds_strict and self.list_left():
            raise Fail(REFUSAL)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def list_left(self) -> list[Any]:
        return [part for part in self.list_assigned() if part.ep_name != self.name]

    def get_providers(self) -> list[str]:
        return [*filter(None, [self.name]), "CPUExecutionProvider"]

    def list_assigned(self) -> list[Any]:
        return [
            SimpleNamespace(ep_name=self._assign(node), get_nodes=lambda node=node: [node])
            for part in self.real.get_provider_graph_assignment_info()
            for node in part.get_nodes()
        ]

    def _assign(self, node: Any) -> str:
        left = self.name is None or node.op_type in self.machine.left
        return "CPUExecutionProvider" if left else str(self.name)

    def run(self, names: None, feed: dict[str, Any]) -> Any:
        if self.machine.run_error is not None and self.name is not None:
            raise self.machine.run_error
        return self.real.run(names, feed)

    def end_profiling(self) -> str:
        file = self.real.end_profiling()
        if self.machine.compiles and self.name is not None:
            event = {"cat": "Node", "name": f"{self.name}_graph_0_kernel_time", "dur": 5, "args": {}}
            Path(file).write_text(json.dumps([event]))
        return file
