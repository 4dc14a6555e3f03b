"""NNCF finds the same subgraphs whether or not nodes of other kinds are left out first."""

from __future__ import annotations

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nncf.common.graph import graph_matching
from nncf.common.graph.patterns import GraphPattern

from cmt_edge.calib.nncf_patterns import fitting_nodes_only

KINDS = ("Conv", "Add", "Mul", "Relu")
KIND = GraphPattern.METATYPE_ATTR


@st.composite
def graphs(draw) -> nx.MultiDiGraph:
    """A graph as NNCF has it, without circles: nodes by name, each with its kind."""
    count = draw(st.integers(1, 14))
    graph = nx.MultiDiGraph()
    for i, kind in enumerate(draw(st.lists(st.sampled_from(KINDS), min_size=count, max_size=count))):
        graph.add_node(f"{i} {kind}", **{KIND: kind, GraphPattern.NODE_TYPE_ATTR: kind})
    names = list(graph)
    for end in range(1, count):
        for start in draw(st.lists(st.integers(0, end - 1), max_size=2)):
            graph.add_edge(names[start], names[end])
    return graph


@st.composite
def patterns(draw) -> GraphPattern:
    """Some chains with branches, as the patterns for hardware are; a kind may be any, or one that no graph
    has."""
    pattern = GraphPattern()
    any_kind = GraphPattern.ANY_PATTERN_NODE_TYPE
    for _ in range(draw(st.integers(1, 4))):
        nodes: list[int] = []
        for _ in range(draw(st.integers(1, 4))):
            kinds = draw(st.sampled_from([["Conv"], ["Add", "Mul"], ["Relu"], ["Gone"], [any_kind], KINDS]))
            node = pattern.add_node(**{GraphPattern.LABEL_ATTR: "a label", KIND: list(kinds)})
            if nodes:
                pattern.add_edge(draw(st.sampled_from(nodes)), node)
            nodes.append(node)
    return pattern


@settings(deadline=None, max_examples=300)
@given(graph=graphs(), pattern=patterns(), strict=st.booleans())
def test_the_same_is_found_in_the_same_order(graph, pattern, strict):
    expected = graph_matching.find_subgraphs_matching_pattern(graph, pattern, strict)
    with fitting_nodes_only():
        assert graph_matching.find_subgraphs_matching_pattern(graph, pattern, strict) == expected


def test_pairs_of_other_kinds_are_not_compared(monkeypatch):
    """The installed NNCF searches as we think, and gets its own search back."""
    own, compared = graph_matching.ism, []
    matcher = own.MultiDiGraphMatcher
    feasible = matcher.syntactic_feasibility
    monkeypatch.setattr(
        matcher, "syntactic_feasibility", lambda *args: compared.append(args[1:]) or feasible(*args)
    )
    graph, pattern = nx.MultiDiGraph(), GraphPattern()
    for kind in ("Conv", "Add", "Add", "Relu"):
        graph.add_node(f"{len(graph)} {kind}", **{KIND: kind})
    nx.add_path(graph, list(graph))
    nodes = [pattern.add_node(**{GraphPattern.LABEL_ATTR: kind, KIND: [kind]}) for kind in ("Conv", "Add")]
    pattern.add_edge(*nodes)
    counts = []
    for block in (fitting_nodes_only, pytest.MonkeyPatch.context):
        compared.clear()
        with block():
            assert graph_matching.find_subgraphs_matching_pattern(graph, pattern) == [["0 Conv", "1 Add"]]
        counts.append(len(compared))
        assert graph_matching.ism is own
    assert counts[0] < counts[1]
    compared.clear()
    pattern.add_edge(nodes[1], pattern.add_node(**{GraphPattern.LABEL_ATTR: "gone", KIND: ["Gone"]}))
    with fitting_nodes_only():
        assert graph_matching.find_subgraphs_matching_pattern(graph, pattern) == []
    assert compared == []


def test_another_nncf_is_left_as_it_is(monkeypatch):
    monkeypatch.delattr(graph_matching, "ism")
    with fitting_nodes_only():
        assert not hasattr(graph_matching, "ism")
