"""NNCF's search for its patterns, without the comparisons that cannot fit.

Before NNCF places quantizers it looks for some two hundred patterns, one after the other, in the whole graph.
It compares the neighbours of two nodes before it looks whether the nodes are of one kind, and most patterns
have kinds that the graph lacks: that took most of the time that NNCF spent on a hybrid model.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

NodeMatch = Callable[[dict[str, Any], dict[str, Any]], bool]
"""Whether a node of the graph is of the kind that a node of the pattern asks for."""


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
    graph_matching.ism = SimpleNamespace(MultiDiGraphMatcher=partial(_open_matcher, matcher))
    try:
        yield
    finally:
        graph_matching.ism = found


def _open_matcher(base: Any, graph: Any, pattern: Any, node_match: NodeMatch, **more: Any) -> Any:
    """A matcher of networkx that compares each node of the pattern with those that fit it.

    Args:
        base: :class:`networkx.algorithms.isomorphism.MultiDiGraphMatcher`.
        graph, pattern: of networkx.
        node_match: whether two nodes are of one kind, by their attributes.
        more: as ``base`` takes it.
    """
    matcher = base(graph, pattern, node_match=node_match, **more)
    fitting, find_pairs = _find_fitting(graph, pattern, node_match), matcher.candidate_pairs_iter

    def find_fitting_pairs() -> Iterator[tuple[Hashable, Hashable]]:
        if all(fitting.values()):
            yield from (pair for pair in find_pairs() if pair[0] in fitting[pair[1]])

    matcher.candidate_pairs_iter = find_fitting_pairs
    return matcher


def _find_fitting(graph: Any, pattern: Any, node_match: NodeMatch) -> dict[Hashable, set[Hashable]]:
    """Node of the pattern -> the nodes of the graph that are of its kind, up to the first one without any."""
    kinds = [*graph.nodes(data=True)]
    fitting: dict[Hashable, set[Hashable]] = {}
    for wanted, kind in pattern.nodes(data=True):
        fitting[wanted] = {node for node, own in kinds if node_match(own, kind)}
        if not fitting[wanted]:
            break
    return fitting
