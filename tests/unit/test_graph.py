"""Copies of nodes, values and graphs: every field, and nothing shared that may be edited."""

from __future__ import annotations

import copy
from dataclasses import fields
from typing import Any

import pytest

from mpcompile.graph import NOTHING, Node, PrecisionGraph, Value


def filled(kind: type, containers: dict[str, Any]) -> Any:
    """An object whose every field holds something of its own."""
    one = kind("name", "op")
    for spec in fields(kind):
        setattr(one, spec.name, containers.get(spec.name, f"the {spec.name}"))
    return one


def test_a_node_s_copy_has_every_field_and_containers_of_its_own() -> None:
    containers = {
        "inputs": ["x"], "outputs": ["y"], "slots": (3,), "attrs": {"a": 1}, "operands": {0: "any"}, "results": {1: "fp32"},
        "fp8": {"output": "why"},
    }  # fmt: skip
    node = filled(Node, containers)
    twin = node.copy()
    assert twin is not node
    assert twin == node
    assert all(getattr(twin, name) is not held for name, held in containers.items() if name != "slots")


def test_nodes_share_an_empty_dict_that_nobody_can_fill() -> None:
    one, other = Node("a", "op", ["x"]), Node("b", "op", attrs={}).copy()
    assert one.attrs is one.operands is one.results is other.attrs is NOTHING
    for fill in (dict.__setitem__, dict.setdefault):
        with pytest.raises(TypeError, match="a dict of its own"):
            getattr(one.attrs, fill.__name__)("a", 1)
    for fill in (dict.update, dict.__ior__):
        with pytest.raises(TypeError, match="a dict of its own"):
            getattr(one.attrs, fill.__name__)({"a": 1})
    assert NOTHING == {} == copy.deepcopy(NOTHING)


def test_slots_are_counted_and_no_list_of_the_caller_s_is_kept() -> None:
    given = [0, 2]
    node = Node("a", "op", ["x", "y"], slots=given)
    given.append(3)
    assert node.slots == (0, 2)
    assert Node("b", "op", ["x", "y"]).slots == (0, 1)


def test_a_graph_s_copy_has_values_with_every_field() -> None:
    value = filled(Value, {"shape": (2, "n"), "range": (0.0, 1.0), "producer": ""})
    graph = PrecisionGraph(values={value.name: value}, inputs=[value.name], header={"source": "fx"})
    twin = graph.copy()
    assert twin == graph
    assert twin.values[value.name] is not value
    assert twin.inputs is not graph.inputs
    assert twin.header is not graph.header


def test_readers_are_noted_once_per_operand() -> None:
    graph = PrecisionGraph()
    graph.add_input(Value("x", "fp32"))
    square = graph.add(Node("y", "aten.mul.Tensor", ["x", "x"]), [Value("y", "fp32")])
    assert graph.readers() == {"x": [square, square], "y": []}
