"""What a runtime really ran, operation by operation, and the sums of it by precision."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass

from ..bundle.sections import ExecutedPrecision


@dataclass(frozen=True)
class NodeRun:
    """An operation of a runtime's execution graph.

    Attributes:
        name: the runtime's.
        kind: the runtime's name of the operation's class, ``"Convolution"`` for instance.
        precision: that it computes in, as reports call it.
        seconds: that it took, summed over all profiled inferences.
        is_conversion: whether it only changes the type or the memory layout of a tensor.
        sources: names of the operations of ``model.onnx`` that it computes, as far as the runtime tells.
    """

    name: str
    kind: str
    precision: str
    seconds: float
    is_conversion: bool
    sources: tuple[str, ...] = ()


@dataclass(frozen=True)
class Profile:
    """The operations in the order in which they run, and where that is from."""

    nodes: tuple[NodeRun, ...]
    source: str

    @property
    def seconds(self) -> float:
        """That all of them took; above 0, so that shares can be computed."""
        return sum(node.seconds for node in self.nodes) or 1.0

    def summarise(self) -> ExecutedPrecision:
        """The shares by precision."""
        spent: defaultdict[str, float] = defaultdict(float)
        for node in self.nodes:
            spent[node.precision] += node.seconds
        conversion = sum(node.seconds for node in self.nodes if node.is_conversion)
        return ExecutedPrecision(
            time_share={precision: seconds / self.seconds for precision, seconds in spent.items()},
            operations=dict(Counter(node.precision for node in self.nodes)),
            conversion_share=conversion / self.seconds,
            source=self.source,
        )
