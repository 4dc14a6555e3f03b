"""NNCF's search for its patterns, without the comparisons that cannot fit.

Before NNCF places quantizers it looks for some two hundred patterns, one after the other, in the whole graph.
It compares the neighbours of two nodes before it looks whether the nodes are of one kind, and most patterns
have kinds that the graph lacks: that took most of the time that NNCF spent on a hybrid model.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any


@contextmanager
def fitting_nodes_only() -> Iterator[None]:
    """Within the block NNCF compares a pattern's nodes with those of the same kind alone.

    What it finds is the same, in the same order: a pair of nodes must pass both comparisons, whichever is
    first. A version of NNCF that searches in another way is left as it is.
    """
    from nncf.common.graph import graph_matching

    found = getattr(graph_matching, "ism", None)
    matcher = getattr(found, "MultiDiGraphMatcher", None)
    if matcher is None:
        yield
        return
    graph_matching.ism = SimpleNamespace(MultiDiGraphMatcher=_make_matcher(matcher))
    try:
        yield
    finally:
        graph_matching.ism = found


def _make_matcher(base: Any) -> type:
    """A matcher of networkx that first looks which nodes of the graph fit each node of the pattern.

    Args:
        base: :class:`networkx.algorithms.isomorphism.MultiDiGraphMatcher`.
    """

    class Matcher(base):  # type: ignore[misc]
        fitting: dict[Hashable, set[Hashable]]

        def match(self) -> Iterator[dict[Hashable, Hashable]]:
            """Networkx's recursive search, unless a node of the pattern fits none of the graph."""
            if not self.core_1 and not self._find_fitting():
                return
            yield from super().match()

        def _find_fitting(self) -> bool:
            """Whether every node of the pattern fits some node; fills :attr:`fitting`."""
            self.fitting = {}
            kinds = [*self.G1.nodes(data=True)]
            for wanted, kind in self.G2.nodes(data=True):
                fits = {node for node, own in kinds if self.node_match(own, kind)}
                if not fits:
                    return False
                self.fitting[wanted] = fits
            return True

        def candidate_pairs_iter(self) -> Iterator[tuple[Hashable, Hashable]]:
            """Networkx's pairs of nodes that may be equal, without those of different kinds."""
            for node, wanted in super().candidate_pairs_iter():
                if node in self.fitting[wanted]:
                    yield node, wanted

    return Matcher
