"""What a runtime must offer. A new runtime is one module with ``check``, ``compile`` and ``load``, and a line
in the table."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle import Bundle
from ..bundle.sections import ExecutedPrecision


@dataclass(frozen=True)
class LoadOptions:
    """How to open a bundle.

    Attributes:
        device: the runtime's name of a device, e.g. ``"CPU"``; ``None`` is the runtime's default: the CPU, or
            the first GPU.
        threads: CPU threads of one inference; ``None`` uses all cores of this process.
        throughput: prefer many requests at once to the latency of one.
        weights: checkpoint for the torch backend where the bundle's weights came from a file.
    """

    device: str | None = None
    threads: int | None = None
    throughput: bool = False
    weights: str | Path | None = None


@dataclass(frozen=True)
class DeviceTimes:
    """Milliseconds by the device's own clock, one entry an inference, float64 ``(count,)``.

    Attributes:
        compute: the inference alone.
        with_copies: with the copies to and from the device.
        enqueue: what the host spent on starting it.
    """

    compute: np.ndarray
    with_copies: np.ndarray
    enqueue: np.ndarray


@dataclass(frozen=True)
class Binding:
    """A batch and the inference of it, for one thread at a time: fill, run, and again.

    Attributes:
        batch: contiguous float32 ``(N, 3, H, W)``; of any content at first.
        run: the inference; gives what :meth:`Session.run` gives for ``batch``.
    """

    batch: np.ndarray
    run: Callable[[], list[np.ndarray]]


class Session(ABC):
    """A loaded model. ``run`` may be called from several threads at once."""

    runtime: str
    """Name and version, e.g. ``"openvino 2026.4.1"``."""
    device: str
    parallelism: int = 1
    """How many requests at once give the best throughput."""
    notes: Sequence[str] = ()
    """What the runtime could not do as asked, readable."""

    @abstractmethod
    def run(self, batch: np.ndarray) -> list[np.ndarray]:
        """Contiguous float32 ``(N, 3, H, W)`` -> a new float32 array ``(N, ...)`` for each output, in the
        graph's order.

        The caller fills ``batch`` again as soon as the call returns.
        """

    def bind(self, shape: tuple[int, ...]) -> Binding:
        """A batch ``(N, 3, H, W)`` from which the runtime reads with as few copies as it can; any number may
        be bound at once."""
        batch = np.empty(shape, np.float32)
        return Binding(batch, partial(self.run, batch))

    @abstractmethod
    def executed(self, batch: np.ndarray, repeats: int = 10) -> ExecutedPrecision:
        """Run ``batch`` with profiling and say which precisions executed."""

    def device_times(self, batch: np.ndarray, count: int) -> DeviceTimes | None:
        """Time ``count`` inferences by the device's clock; ``None`` where host and device are the same."""
        return None

    def kernels(self, batch: np.ndarray) -> dict[str, float]:
        """Share of the run time by the runtime's own names of its kernels; empty where it tells none."""
        return {}

    def inspect(self) -> str:
        """The runtime's own description of what it compiled, as JSON; empty where it has none."""
        return ""

    def close(self) -> None:
        """Free the runtime's resources; the session cannot be used afterwards."""

    @property
    def info(self) -> dict[str, Any]:
        return {"runtime": self.runtime, "device": self.device}


def batch_limit(bundle: Bundle) -> int:
    """Fixed batch size of the graph, ``0`` if it is dynamic."""
    first = bundle.manifest.input.shape[0]
    return first if isinstance(first, int) else 0
