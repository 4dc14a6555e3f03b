"""The whole check-up: the machine is read here, each runtime is asked in a process of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from importlib import metadata
from importlib.util import find_spec
from typing import Any

from cmt_edge.version import __version__

from ..backends import RUNTIME_OF_FORMAT, RUNTIMES, describe_missing, list_offered_runtimes
from ..bundle.record import read_message
from ..children import Child, ChildCrashed, ChildTimedOut
from ..errors import CmtEdgeError
from ..measure.checkup import Checkup, Fault, FormatState, Machine, RuntimeState
from ..measure.host import PACKAGES, describe_host
from ..telemetry.state import read_state
from .limits import is_on_battery, read_limits, read_profile
from .probe import CALL, describe_fault

PROBE_LIMIT_S = 120.0
"""Seconds that a runtime may take to be imported and to answer; the first import from a slow disk is slow."""

EXPORT_PACKAGES = (
    "torch",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "onnxsim",
    "onnxruntime",
    "nncf",
    "safetensors",
    "threadpoolctl",
)
"""Distributions that every export needs, the extra ``export`` of ``pyproject.toml``."""

EXPORT_REMEDY = 'pip install "cmt-edge[export]"'
"""How the user gets them."""

EXPORT_RUNTIMES = {"openvino": "openvino", "rtx": "tensorrt_rtx"}
"""Format -> the runtime that an export of it needs besides: OpenVINO verifies, TensorRT for RTX compiles. An
export for TensorRT needs none with ``--no-build``."""

MORE_PACKAGES = (
    "onnx-ir",
    "onnxscript",
    "safetensors",
    "threadpoolctl",
    "timm",
    "tensorrt-rtx-cu12",
    "tensorrt-rtx-cu13",
    "nvidia-ml-py",
    "onnxruntime-gpu",
    "onnxruntime-openvino",
    "cryptography",
    "matplotlib",
    "ray",
    "mlcommons-loadgen",
    "tqdm",
    "platformdirs",
)
"""Distributions that a bug report names besides those of every measurement."""

Ask = Callable[[str], RuntimeState]
"""Gives the state of an installed runtime; raises as :meth:`.Child.request`."""
Step = Callable[[str], AbstractContextManager[None]]
"""Announces a step that takes a moment."""


def check_up(formats: Sequence[str], step: Step, ask: Ask | None = None) -> Checkup:
    """Look at the machine, and at the runtimes that ``formats`` need; of all formats, at every runtime.

    Args:
        formats: names of formats.
        step: announces what takes a moment.
        ask: asks a runtime, in a process of its own unless tests have another way.
    """
    needed = {RUNTIME_OF_FORMAT[name] for name in formats}
    everything = needed == set(RUNTIME_OF_FORMAT.values())
    names = [name for name in list_offered_runtimes() if everything or name in needed]
    with step("read the machine"):
        machine = Machine(describe_host(), read_limits(), read_profile(), is_on_battery(), read_state())
    runtimes = []
    for name in names:
        with step(f"ask {name}"):
            runtimes.append(examine(name, ask or ask_child))
    states = {state.name: state for state in runtimes}
    return Checkup(
        version=__version__,
        packages=read_packages(),
        machine=machine,
        runtimes=tuple(runtimes),
        formats=tuple(judge_format(name, states) for name in formats),
    )


def examine(name: str, ask: Ask) -> RuntimeState:
    """The state of a runtime, whatever happens while it is asked."""
    entry = RUNTIMES[name]
    missing = [package for package in entry.packages if find_spec(package) is None]
    if missing:
        return _make_faulty(name, Fault(describe_missing(missing), None, entry.remedy))
    repair = f"repair the installation: {entry.remedy}"
    try:
        return ask(name)
    except CmtEdgeError as exc:
        return _make_faulty(name, describe_fault(exc))
    except ChildCrashed as exc:
        why = f"{exc.ending}: {'; '.join(exc.tail)}" if exc.tail else exc.ending
        return _make_faulty(name, Fault("it ends the process that asks it", why, repair))
    except ChildTimedOut:
        return _make_faulty(name, Fault(f"it gave no answer within {PROBE_LIMIT_S:g} s", None, repair))


def ask_child(name: str) -> RuntimeState:
    """Ask a runtime in a process of its own."""
    with Child("cmt_edge.deploy.doctor.probe") as child:
        content: Any = child.request(CALL, time_limit=PROBE_LIMIT_S, name=name)
    return read_message(RuntimeState, content, "the answer")


def _make_faulty(name: str, fault: Fault) -> RuntimeState:
    return RuntimeState(name, None, (), fault)


def judge_format(name: str, states: dict[str, RuntimeState]) -> FormatState:
    """What a format lacks here, given the states of the runtimes."""
    runtime = RUNTIME_OF_FORMAT[name]
    state = states[runtime]
    export_faults = list(_iterate_export_faults(name, states))
    faults = [state.fault] if state.fault else []
    return FormatState(
        format=name,
        runtime=runtime,
        is_served=state.fault is None,
        can_export=not export_faults,
        faults=tuple(faults + [fault for fault in export_faults if fault not in faults]),
    )


def _iterate_export_faults(name: str, states: dict[str, RuntimeState]) -> Iterator[Fault]:
    """What an export of a format lacks here."""
    installed = read_packages()
    missing = [package for package in EXPORT_PACKAGES if not _is_installed(package, installed)]
    if missing:
        yield Fault(f"an export needs {', '.join(missing)}", None, EXPORT_REMEDY)
    if name in EXPORT_RUNTIMES:
        state = states[EXPORT_RUNTIMES[name]]
        if state.version is None and state.fault is not None:
            yield state.fault


def _is_installed(package: str, installed: dict[str, str]) -> bool:
    """Whether a distribution is there, or one that takes its place: ``onnxruntime-gpu`` for instance."""
    return any(name == package or name.startswith(f"{package}-") for name in installed)


def read_packages() -> dict[str, str]:
    """Installed versions of the packages that a bug report names."""
    found = {}
    for name in dict.fromkeys((*PACKAGES, *MORE_PACKAGES)):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
