"""The whole contract of a runtime: :class:`Runtime` prepares and opens bundles, :class:`Session` runs them.

A new runtime is one module in this folder that ends with ``RUNTIME = ...``, an instance of a subclass of
:class:`Runtime`, and one line in the table of :mod:`cmt_edge.deploy.backends`. The module may import the
runtime's package at its top: it is imported only when the runtime is asked for.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from ..bundle import ONNX, Bundle
from ..bundle.sections import ExecutedPrecision, RanOn
from ..errors import BundleError, InputError
from .profile import Profile

WARM_UP_RUNS = 2
"""Inferences at the start of a profile that warm up and do not count."""
SHOWN_RUNTIME_CHARACTERS = 300
"""The largest number of characters of a runtime's own message that an error quotes."""


@dataclass(frozen=True)
class LoadOptions:
    """How to open a bundle.

    Attributes:
        device: the runtime's name of a device, e.g. ``"CPU"``; ``None`` is the runtime's default: the CPU, or
            the first GPU. ONNX Runtime also takes those of :data:`.providers.PROVIDERS`, e.g. ``"cuda:1"``
            and ``"openvino:GPU"``.
        threads: CPU threads of one inference; ``None`` uses all cores of this process.
        throughput: prefer many requests at once to the latency of one.
        weights: checkpoint for the torch backend where the bundle's weights came from a file.
        trusted_model: for the torch backend, the name of a model from outside the registry that the user
            trusts, or the module object itself; a manifest alone never makes Python import such code.
        trusted_engine: open the engine in a bundle although it was built on another machine and the bundle
            was opened without a key; an engine is native code.
        cache: a runtime that compiles may take what an earlier process has compiled, and may keep what it
            compiles.
    """

    device: str | None = None
    threads: int | None = None
    throughput: bool = False
    weights: str | Path | None = None
    trusted_model: object = None
    trusted_engine: bool = False
    cache: bool = True


@dataclass(frozen=True)
class DeviceTimes:
    """Milliseconds measured by the device's own clock: float64 ``(count,)``, one entry per inference.

    Attributes:
        compute: the inference alone.
        with_copies: with the copies to and from the device.
        enqueue: the time that the host needed to start it.
    """

    compute: np.ndarray
    with_copies: np.ndarray
    enqueue: np.ndarray


@dataclass(frozen=True)
class Binding:
    """A batch and its inference, for one thread at a time: fill the batch, run, and fill it again.

    Attributes:
        batch: contiguous float32 ``(N, 3, H, W)``; its first content is undefined.
        run: the inference; it returns what :meth:`Session.run` returns for ``batch``.
    """

    batch: np.ndarray
    run: Callable[[], list[np.ndarray]]


class Session(ABC):
    """A loaded model. ``run`` may be called from several threads at once."""

    runtime: str
    """Name and version of the runtime, e.g. ``"openvino 2026.4.1"``."""
    device: str
    """The runtime's name of the device, e.g. ``"CPU"``."""
    parallelism: int = 1
    """The number of concurrent requests that gives the best throughput."""
    is_from_cache: bool = False
    """Whether the model was compiled by an earlier process, see :attr:`LoadOptions.cache`."""
    notes: Sequence[str] = ()
    """What the runtime could not do as asked, one readable sentence each."""

    @abstractmethod
    def run(self, batch: np.ndarray) -> list[np.ndarray]:
        """Contiguous float32 ``(N, 3, H, W)`` -> one new float32 array ``(N, ...)`` per output, in the
        graph's order.

        The caller may fill ``batch`` again as soon as the call has returned.
        """

    def bind(self, shape: tuple[int, ...]) -> Binding:
        """A batch ``(N, 3, H, W)`` that the runtime reads with as few copies as it can; any number of
        bindings may exist at once."""
        batch = np.empty(shape, np.float32)
        return Binding(batch, partial(self.run, batch))

    @abstractmethod
    def executed(self, batch: np.ndarray, repeats: int = 10) -> ExecutedPrecision:
        """Run ``batch`` with profiling and say which precisions were executed."""

    def profile(self, batch: np.ndarray, repeats: int = 10) -> Profile | None:
        """Run ``batch`` with profiling and say what each operation took; ``None`` where the runtime does not
        tell. Its sums are what :meth:`executed` gives."""
        return None

    def device_times(self, batch: np.ndarray, count: int) -> DeviceTimes | None:
        """Time ``count`` inferences by the device's clock; ``None`` where host and device are the same."""
        return None

    def kernels(self, batch: np.ndarray) -> dict[str, float]:
        """Share of the run time by the runtime's own names of its kernels; empty where it names none."""
        return {}

    def inspect(self) -> str:
        """The runtime's own description of what it compiled, as JSON; empty where it has none."""
        return ""

    def close(self) -> None:
        """Free the runtime's resources; the session cannot be used afterwards."""

    @property
    def info(self) -> RanOn:
        """Runtime with its version, and device: what results name."""
        return RanOn(self.runtime, self.device)


class Runtime(ABC):
    """How a runtime prepares and opens bundles. It has no state: one instance serves the whole process."""

    any_batch: bool = False
    """Whether its sessions take any batch size, also for a bundle whose graph has a fixed one."""

    @abstractmethod
    def check(self, device: str | None = None) -> str:
        """Name and version of the runtime, e.g. ``"openvino 2026.4.1"``.

        Raises:
            RuntimeMissingError: ``device`` is not available on this machine.
        """

    def float_precision(self, precision: str, device: str | None = None) -> str:
        """The precision in which ``device`` computes what is not quantized in a bundle of ``precision``.

        Raises:
            RuntimeMissingError: the device lacks the instructions that ``precision`` needs.
            InputError: the runtime cannot run ``precision`` at all.
        """
        return "fp32" if precision == "int8" else precision

    @abstractmethod
    def load(self, bundle: Bundle, options: LoadOptions) -> Session:
        """Open a bundle whose hashes were checked.

        Raises:
            RuntimeMissingError: the device, or an instruction set that the bundle needs, is missing.
            InputError: the runtime cannot run the bundle's precision.
            BundleError: the bundle lacks what the runtime needs.
        """

    def open_watched(self, bundle: Bundle, options: LoadOptions, tensors: Sequence[str]) -> Session:
        """As :meth:`load`, but :meth:`Session.run` also returns ``tensors`` of the graph, behind its outputs
        and in this order.

        What is computed stays the same as far as the runtime lets it: one that fuses operations may round
        elsewhere. :mod:`cmt_edge.deploy.measure.layers` measures that.

        Raises:
            InputError: the runtime cannot show them.
            BundleError: the graph does not have one of them.
        """
        raise InputError(
            "this runtime does not show what it computes inside the graph",
            where=bundle.path,
            remedy="use --backend onnxruntime or --backend openvino",
        )


def make_lacking_error(bundle: Bundle, tensor: str) -> BundleError:
    """The error for a tensor that the manifest names and the graph lacks."""
    return BundleError(
        f"the manifest names a tensor {tensor!r} that the graph does not have",
        where=bundle.path / ONNX,
        remedy="export the bundle again",
    )


def read_batch_limit(bundle: Bundle) -> int:
    """Fixed batch size of the graph, ``0`` if it is dynamic."""
    first = bundle.manifest.input.shape[0]
    return first if isinstance(first, int) else 0


def make_open_error(where: object, exc: Exception) -> BundleError:
    """The error for a graph that a runtime does not open, whatever it raised of its own."""
    return BundleError(
        "the runtime cannot open the bundle's graph",
        where=where,
        why=f"{type(exc).__name__}: {' '.join(str(exc).split())[:SHOWN_RUNTIME_CHARACTERS]}",
        remedy="copy the whole bundle again, or export it again; another --backend may take it",
    )


def make_run_error(where: object, exc: Exception) -> BundleError:
    """The error for a graph that a runtime has opened and cannot run, whatever it raised of its own."""
    return BundleError(
        "the runtime failed while it ran the bundle's graph",
        where=where,
        why=f"{type(exc).__name__}: {' '.join(str(exc).split())[:SHOWN_RUNTIME_CHARACTERS]}",
        remedy="give the process more memory if it lacked some; otherwise export the bundle again, or try "
        "another --backend",
    )
