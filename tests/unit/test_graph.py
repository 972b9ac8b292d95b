"""Copies of nodes, values and graphs: every field, and nothing shared that may be edited."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from mpcompile.graph import Node, PrecisionGraph, Value


def filled(kind: type, containers: dict[str, Any]) -> Any:
    """An object whose every field holds something of its own."""
    one = kind("name", "op")
    for spec in fields(kind):
        setattr(one, spec.name, containers.get(spec.name, f"the {spec.name}"))
    return one


def test_a_node_s_copy_has_every_field_and_containers_of_its_own() -> None:
    containers = {
        "inputs": ["x"], "outputs": ["y"], "slots": [3], "attrs": {"a": 1}, "operands": {0: "any"}, "results": {1: "fp32"}
    }  # fmt: skip
    node = filled(Node, containers)
    twin = node.copy()
    assert twin is not node
    assert twin == node
    assert all(getattr(twin, name) is not held for name, held in containers.items())


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
