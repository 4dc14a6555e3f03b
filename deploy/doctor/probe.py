"""What a runtime can do here, asked in a process of its own: one that is broken may end the process.

``python -m cmt_edge.deploy.doctor.probe`` is that process; :mod:`cmt_edge.deploy.children` says how both
sides speak.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

from ..backends import get_runtime
from ..backends.providers import CPU, PROVIDERS, Provider, parse_place
from ..bundle import make_plain
from ..children import Report, Request, serve
from ..errors import CmtEdgeError, RuntimeMissingError, StepError
from ..measure.checkup import Fault, FoundDevice, RuntimeState
from ..tensorrt.bindings import RTX, TENSORRT, Bindings, open_bindings

CALL = "probe"
"""The only request: the state of the runtime ``name``."""

CPU_PRECISIONS = ("fp32", "int8")
"""What ONNX Runtime and PyTorch compute in on a processor."""


def probe(name: str) -> RuntimeState:
    """The state of a runtime, which is imported here.

    Raises :class:`RuntimeMissingError` where it cannot be loaded.
    """
    runtime = get_runtime(name)
    list_devices = LISTS.get(name, _iterate_processor)
    devices = tuple(sorted(list_devices(), key=lambda device: device.fault is not None))
    usable = [device for device in devices if device.fault is None]
    fault = devices[0].fault if devices and not usable else None
    return RuntimeState(name, _read_version(runtime), devices, fault)


def describe_fault(error: CmtEdgeError) -> Fault:
    """An error as a part of the result."""
    return Fault(error.what, error.why, error.remedy)


def _read_version(runtime: Any) -> str:
    """Name and version; those of NVIDIA's runtimes are known without a GPU."""
    bindings = getattr(runtime, "bindings", None)
    return str(bindings.runtime) if bindings else str(runtime.check())


def _iterate_processor() -> Iterator[FoundDevice]:
    yield FoundDevice(CPU, "this processor", CPU_PRECISIONS)


def _iterate_openvino() -> Iterator[FoundDevice]:
    from ..backends.openvino_core import open_core
    from ..backends.openvino_devices import CAPABILITIES, read_device

    core = open_core()
    for name in core.available_devices:
        device = read_device(core, name)
        precisions = tuple(precision for precision in CAPABILITIES if device.computes_in(precision))
        title = " ".join(str(core.get_property(name, "FULL_DEVICE_NAME")).split())
        yield FoundDevice(name, title, precisions)


def _iterate_onnxruntime() -> Iterator[FoundDevice]:
    import onnxruntime as ort

    offered = ort.get_available_providers()
    yield from _iterate_processor()
    for kind, provider in PROVIDERS.items():
        is_plugin = bool(provider.plugin) and find_spec(provider.plugin) is not None
        if is_plugin or provider.name in offered:
            yield _try_provider(kind, provider)


def _try_provider(kind: str, provider: Provider) -> FoundDevice:
    """A device that ONNX Runtime has a provider for, which may fail to start."""
    from ..backends.provider_sessions import find_offer

    name = kind if provider.first else f"{kind}:{CPU}"
    place = parse_place(name)
    assert place is not None
    try:
        title = str(find_offer(place))
    except RuntimeMissingError as exc:
        return FoundDevice(name, provider.name, (), describe_fault(exc))
    precisions = ("fp32", "fp16", "int8") if provider.has_int8 else ("fp32", "fp16")
    return FoundDevice(name, title, precisions)


def _iterate_gpus(bindings: Bindings) -> Iterator[FoundDevice]:
    """NVIDIA's GPUs, as CUDA counts them."""
    from ..tensorrt.cuda import open_cuda

    try:
        cuda = open_cuda()
        count = int(cuda.call("cudaGetDeviceCount"))
        gpus = [cuda.gpu(index) for index in range(max(1, count))]
    except CmtEdgeError as exc:
        yield FoundDevice("0", "NVIDIA GPU", (), describe_fault(exc))
        return
    for gpu in gpus:
        title = f"{gpu.name}, compute capability {gpu.sm}, CUDA {cuda.driver_version()}"
        yield _judge_gpu(str(gpu.index), title, gpu.sm, bindings)


def _judge_gpu(name: str, title: str, sm: str, bindings: Bindings) -> FoundDevice:
    """A GPU, and whether the compiler's engines run on it."""
    if bindings.serves(sm):
        return FoundDevice(name, title, ("fp32", "fp16", "int8"))
    fault = Fault(
        f"{bindings.product.title} serves no GPU of compute capability {sm}",
        None,
        "use --format trt with TensorRT there, or --format onnx with --device cuda",
    )
    return FoundDevice(name, title, (), fault)


def _iterate_torch() -> Iterator[FoundDevice]:
    yield FoundDevice(CPU, "the reference of every check", ("fp32",))


LISTS: dict[str, Callable[[], Iterator[FoundDevice]]] = {
    "openvino": _iterate_openvino,
    "onnxruntime": _iterate_onnxruntime,
    "tensorrt": lambda: _iterate_gpus(open_bindings(TENSORRT)),
    "tensorrt_rtx": lambda: _iterate_gpus(open_bindings(RTX)),
    "torch": _iterate_torch,
    "kserve": lambda: iter(()),  # its devices are servers, which are asked only where a user names one
}
"""Name of a runtime -> what finds its devices."""


def _answer(request: Request, report: Report) -> Any:
    return make_plain(probe(request["name"]))


def _name_failure(exc: Exception) -> CmtEdgeError:
    return StepError("the runtime fails as soon as it is asked", why=f"{type(exc).__name__}: {exc}")


if __name__ == "__main__":
    serve({CALL: _answer}, _name_failure)
