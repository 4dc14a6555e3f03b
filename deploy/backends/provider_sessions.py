"""Sessions of ONNX Runtime on another device than the CPU, all of their graph or an error.

ONNX Runtime hides what a provider cannot do. A provider that does not start is left out with a warning, an
inference that fails is repeated on the CPU, a node without a kernel goes to the CPU, and a device that
OpenVINO's provider does not know becomes its default one. So names are checked before, fallbacks are switched
off, and afterwards the session's own record of which provider runs which node is read.

Sources: ONNX Runtime documentation, "Using a Plugin Execution Provider Library"; its
``onnxruntime_session_options_config_keys.h``.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
import sys
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import onnxruntime as ort

from ..errors import RuntimeMissingError
from .base import SHOWN_RUNTIME_CHARACTERS, make_open_error
from .providers import Demand, Place, Provider

STRICT = "session.disable_cpu_ep_fallback"
"""Setting that refuses a graph of which the CPU would run a part; OpenVINO's provider, too, heeds it where it
would leave an NPU for the CPU."""
RECORD = "session.record_ep_graph_assignment_info"
"""Setting that makes a session remember which provider runs which node."""
REFUSED = "fallback to CPU EP has been explicitly disabled"
"""In the message of a session that :data:`STRICT` refuses."""
GRAPH_ERRORS = frozenset(("InvalidGraph", "InvalidProtobuf", "NoModel", "NoSuchFile"))
"""ONNX Runtime's exceptions that tell of the graph and not of the provider."""
EMPTY_GRAPH = bytes.fromhex(
    "080812003a25120167"  # ModelProto: ir_version 8, graph "g"
    "5a0f0a0178120a0a08080112040a020801"  # its input x, float32 (1)
    "620f0a0178120a0a08080112040a020801"  # its output x
    "42040a00100d"  # opset 13
)
"""A graph without nodes, which shows whether a provider starts."""
CUDA_RUNTIME = "libcudart.so.*"
"""Pattern of the name of CUDA's runtime."""
FIRST = "0"
"""The device that is there if any is."""
ERRORS_ONLY = 3
"""Level of ONNX Runtime's log for what belongs to no session: it warns of every device of CUDA that no
plug-in claims."""
SILENT = 4
"""ONNX Runtime's log level that hides what becomes an error of ours."""
OLDEST = "1.24"
"""The first release of ONNX Runtime that tells which provider runs which node."""
SHOWN_OPERATORS = 5
"""The largest number of kinds of operators that a message names."""

_registering = threading.Lock()
"""Held while the library of a plug-in is registered, which works once a process."""


@dataclass(frozen=True)
class Offer:
    """A provider as it is found here.

    Attributes:
        provider: which one.
        device: of the plug-in; ``None`` where the provider is part of ``onnxruntime``.
    """

    provider: Provider
    device: Any = None

    def __str__(self) -> str:
        version = "" if self.device is None else self.device.ep_metadata.get("version", "")
        return f"{self.provider.name} {version.split('+')[0]}".rstrip()


def find_offer(place: Place) -> Offer:
    """The provider of a device; registers the library of its plug-in, if that is installed.

    Raises:
        RuntimeMissingError: ``onnxruntime`` is too old to tell what a provider runs, it has no such provider,
            the provider does not start, or the plug-in finds no such device.
    """
    _require_record(place)
    provider = place.provider
    if not _list_devices(provider):
        if provider.name in ort.get_available_providers():
            offer = Offer(provider)
            _require_start(offer, place)
            return offer
        _register(place)
    devices = [device for device in _list_devices(provider) if not _is_virtual(device)]
    return Offer(provider, _choose_device(place, devices))


def _require_record(place: Place) -> None:
    if hasattr(ort.InferenceSession, "get_provider_graph_assignment_info"):
        return
    raise RuntimeMissingError(
        f"onnxruntime {ort.__version__} does not tell which nodes run on {place}, so it might be the CPU",
        remedy=f'pip install "onnxruntime>={OLDEST}", or the same release of the package that is installed',
    )


def _list_devices(provider: Provider) -> list[Any]:
    """The devices of a plug-in that is registered; none for a provider that is part of ``onnxruntime``."""
    return [device for device in ort.get_ep_devices() if device.ep_name == provider.name]


def _is_virtual(device: Any) -> bool:
    """Whether one can only compile for a device, which is not here."""
    return bool(device.device.metadata.get("is_virtual") == "1")


def _require_start(offer: Offer, place: Place) -> None:
    """Raise :class:`RuntimeMissingError` unless a provider of ``onnxruntime`` itself starts: a session would
    leave it out and run on the CPU."""
    if offer.provider.needs_cuda:
        _load_cuda()
    why = _try_to_start(offer, place.unit)
    if why is None:
        return
    if place.unit != FIRST and _try_to_start(offer, FIRST) is None:
        raise RuntimeMissingError(
            f"{offer.provider.name} finds no device {str(place)!r} here",
            why=f"device {FIRST} starts, this one does not: {why}",
            remedy="choose another number",
        )
    raise _make_start_error(offer, place, why)


def _try_to_start(offer: Offer, unit: str) -> str | None:
    """``None`` where a provider starts on a device, else why it does not."""
    try:
        session = _open(offer, EMPTY_GRAPH, ort.SessionOptions(), Demand(unit, "fp32", None), strict=False)
    except Exception as exc:  # it has a dozen types of its own
        return _shorten(exc)
    if offer.provider.name in session.get_providers():
        return None
    return "ONNX Runtime left it out and told why on standard error"


def _load_cuda() -> None:
    """Load NVIDIA's libraries from pip's packages, if they are installed so.

    What this prints goes to standard error, because standard output belongs to answers.
    """
    with contextlib.redirect_stdout(sys.stderr):
        ort.preload_dlls()


def _register(place: Place) -> None:
    """Tell ONNX Runtime of a plug-in's library."""
    provider = place.provider
    if not provider.plugin or find_spec(provider.plugin) is None:
        raise RuntimeMissingError(
            f"ONNX Runtime has no {provider.name} here, which --device {place} needs",
            remedy=provider.remedy,
        )
    with _registering:
        if _list_devices(provider):
            return
        try:
            library = import_module(provider.plugin).get_library_path()
            _load_cuda_beside(library)
            ort.register_execution_provider_library(provider.name, library)
        except Exception as exc:  # what a library lacks is told in many types
            if _is_registered(exc):
                return
            raise RuntimeMissingError(
                f"the plug-in {provider.plugin} is installed but cannot be loaded",
                why=_shorten(exc),
                remedy=f"install the driver of the device, or repair the installation: {provider.remedy}",
            ) from exc


def _load_cuda_beside(library: str) -> None:
    """Load CUDA's runtime that comes with a plug-in. Release 0.5.0 of NVIDIA's has it under its full name
    alone, which its own library does not ask for; once it is loaded, it is found."""
    for file in sorted(Path(library).parent.glob(CUDA_RUNTIME)):
        with contextlib.suppress(OSError):  # the plug-in says what it lacks
            ctypes.CDLL(str(file), mode=ctypes.RTLD_GLOBAL)


def _is_registered(exc: Exception) -> bool:
    """Whether a plug-in was refused only because it is known: it found no device the first time."""
    return "already registered" in str(exc)


def _choose_device(place: Place, devices: list[Any]) -> Any:
    """The one of a plug-in's devices that was asked for."""
    if place.unit.isdigit():
        chosen = devices[int(place.unit) :][:1]
    else:
        names = [device.ep_metadata.get("ov_device", "") for device in devices]
        wanted = (place.unit, f"{place.unit}.0")
        chosen = [device for device, name in zip(devices, names, strict=True) if name in wanted][:1]
    if chosen:
        return chosen[0]
    found = ", ".join(map(_describe_device, devices)) or "none"
    raise RuntimeMissingError(
        f"{place.provider.name} finds no device {str(place)!r} here",
        why=f"its devices are: {found}",
        remedy="check the driver, or use --device CPU; a plug-in serves only devices of its vendor",
    )


def _describe_device(device: Any) -> str:
    """A device of a plug-in, for a message."""
    return str(device.ep_metadata.get("ov_device") or device.device.type.name)


def open_on(
    place: Place,
    model: str | bytes,
    make_options: Callable[[], ort.SessionOptions],
    demand: Demand,
    where: object,
) -> tuple[Offer, ort.InferenceSession]:
    """Open a graph on a device, all of it.

    Args:
        place: the device.
        model: path of the graph, or its bytes.
        make_options: makes the options of a session; it may be called twice.
        demand: what the provider's options depend on.
        where: the graph, for messages.

    Raises:
        RuntimeMissingError: as :func:`find_offer`; or the provider fails, or lacks kernels for a part of
            the graph.
        BundleError: the graph is broken.
    """
    offer = find_offer(place)
    try:
        session = _open(offer, model, make_options(), demand, strict=True)
    except Exception as exc:  # it has a dozen types of its own
        if type(exc).__name__ in GRAPH_ERRORS:
            raise make_open_error(where, exc) from exc
        if REFUSED in str(exc):
            _refuse_left_nodes(offer, place, model, make_options(), demand)
        raise _make_start_error(offer, place, _shorten(exc)) from exc
    require_whole(session, offer, place)
    return offer, session


def _open(
    offer: Offer,
    model: str | bytes,
    options: ort.SessionOptions,
    demand: Demand,
    *,
    strict: bool,
) -> ort.InferenceSession:
    """A session that records who runs what; a ``strict`` one is refused where the CPU runs a part."""
    ort.set_default_logger_severity(ERRORS_ONLY)
    options.log_severity_level = SILENT
    options.add_session_config_entry(RECORD, "1")
    options.add_session_config_entry(STRICT, "1" if strict else "0")
    if offer.device is not None:
        settings = offer.provider.make_plugin_settings(demand)
        options.add_provider_for_devices([offer.device], settings)
        return ort.InferenceSession(model, options, enable_fallback=0)
    chosen = (offer.provider.name, offer.provider.make_settings(demand))
    return ort.InferenceSession(model, options, providers=[chosen], enable_fallback=0)


def _refuse_left_nodes(
    offer: Offer,
    place: Place,
    model: str | bytes,
    options: ort.SessionOptions,
    demand: Demand,
) -> None:
    """Raise the error that names what the CPU would run: a strict session does not tell."""
    try:
        session = _open(offer, model, options, demand, strict=False)
    except Exception:  # then the first error is the one to tell
        return
    require_whole(session, offer, place)


def require_whole(session: ort.InferenceSession, offer: Offer, place: Place) -> None:
    """Raise :class:`RuntimeMissingError` unless a session's record says that the provider runs every node."""
    provider = offer.provider.name
    assigned = count_operators(session)
    total = sum(sum(operators.values()) for operators in assigned.values())
    left = sum((counts for name, counts in assigned.items() if name != provider), Counter[str]())
    if total and not left:
        return
    if not total:
        raise _make_start_error(offer, place, "the session has no record of who runs its nodes")
    named = [operator for operator, _ in left.most_common()]
    more = f" and {len(named) - SHOWN_OPERATORS} more kinds" if len(named) > SHOWN_OPERATORS else ""
    raise RuntimeMissingError(
        f"{provider} would leave {left.total()} of {total} nodes to the CPU: "
        f"{', '.join(named[:SHOWN_OPERATORS])}{more}",
        remedy=f"use --device CPU, or another one than {place}; a newer release may have the kernels",
    )


def count_operators(session: ort.InferenceSession) -> dict[str, Counter[str]]:
    """Name of a provider -> kind of operator -> number of the graph's nodes that it runs, as the session
    recorded it."""
    found: dict[str, Counter[str]] = {}
    for part in session.get_provider_graph_assignment_info():
        found.setdefault(part.ep_name, Counter()).update(node.op_type for node in part.get_nodes())
    return found


def _make_start_error(offer: Offer, place: Place, why: str) -> RuntimeMissingError:
    return RuntimeMissingError(
        f"{offer.provider.name} could not be started for --device {place}",
        why=why,
        remedy=f"check the device and its driver; {offer.provider.remedy}",
    )


def _shorten(exc: Exception) -> str:
    """One line of what a runtime says, without the colours of its log."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(exc))
    return f"{type(exc).__name__}: {' '.join(text.split())[:SHOWN_RUNTIME_CHARACTERS]}"
