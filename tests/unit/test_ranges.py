"""Ranges as data: spreads, intervals of loss scales, the file, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpcompile.errors import RuleError
from mpcompile.graph import Node, PrecisionGraph, Value
from mpcompile.measured_graph import Made, MeasuredGraph, keyed, measured_graph
from mpcompile.ranges import Ranges, Spread, unfit_gradients

SPREADS = st.builds(
    Spread, st.floats(-1e30, 0), st.floats(0, 1e30), st.dictionaries(st.integers(-140, 120), st.integers(1, 99))
)


GRAPH = MeasuredGraph(
    frozenset({"[4]"}),
    {"a|op|0": Made(("input of 1 dimensions", "b|op|1"), {"dims": (0, 1), "other": 2.5, "how": "none"})},
)


def size(power: int, count: int = 10) -> Spread:
    return Spread(-(2.0**power), 2.0**power, {power: count})


@given(st.dictionaries(st.text(), SPREADS), st.dictionaries(st.text(), SPREADS), st.integers(0, 9))
def test_every_field_survives_the_file(values: dict[str, Spread], gradients: dict[str, Spread], batches: int) -> None:
    made = Ranges(values, gradients, {"a.weight": (2, 3)}, [GRAPH], batches)
    assert Ranges._read(json.loads(json.dumps(made.to_dict()))) == made


@given(SPREADS, SPREADS)
def test_joining_counts_and_widens(one: Spread, other: Spread) -> None:
    both = one.joined(other)
    assert both.largest == max(one.largest, other.largest)
    assert sum(both.sizes.values()) == sum(one.sizes.values()) + sum(other.sizes.values())
    assert one.joined(other) == other.joined(one)


def test_what_vanishes_is_counted_by_powers_of_two() -> None:
    one = Spread(-1.0, 1.0, {-30: 1, -26: 2, -25: 1, 0: 4})
    assert one.vanishing(2.0**-25) == 3 / 8
    assert one.measured("fp16").vanishing == 3 / 8
    assert one.measured("bf16").vanishing == 0


def test_the_scale_is_the_one_that_suits_most() -> None:
    usual = {f"n{i}": size(-20) for i in range(5)}
    assert unfit_gradients(usual, "fp16") == {}
    found = unfit_gradients({**usual, "steep": size(20), "faint": size(-60)}, "fp16")
    assert found.keys() == {"steep", "faint"}
    assert "beyond fp16 at a loss scale of" in found["steep"]
    assert "is zero in fp16" in found["faint"]
    assert unfit_gradients({"steep": size(20), "all": size(19)}, "fp16").keys() == {"steep", "all"}
    assert unfit_gradients({}, "fp16") == {}


def graph(*modules: str) -> PrecisionGraph:
    made = PrecisionGraph()
    made.add_input(Value("x", "fp32", (4,), 4))
    for number, module in enumerate(modules):
        node = Node(f"n{number}", "aten.relu.default", ["x"], module=module)
        made.add(node, [Value(f"v{number}", "fp32", (4,), 4)])
    return made


def test_nodes_are_known_by_module_operation_and_number() -> None:
    keys = [key for key, _ in keyed(graph("a", "a", "b", ""))]
    assert keys == ["a|aten.relu.default|0", "a|aten.relu.default|1", "b|aten.relu.default|0", "|aten.relu.default|0"]


def test_ranges_of_another_model_are_refused() -> None:
    made = Ranges(parameters={"a.weight": (2, 3)}, graphs=[measured_graph(graph("a", ""))])
    made.check({"a.weight": [2, 3]})
    made.check_graph(graph("a", ""))
    for other in ({"a.weight": (2, 4)}, {}, {"a.weight": (2, 3), "b": (1,)}):
        with pytest.raises(RuleError, match="MP207"):
            made.check(other)
    for modules in (("a", "b"), ("a", "", "")):
        with pytest.raises(RuleError, match="MP207"):
            made.check_graph(graph(*modules))


def chain(*ops: str, told: dict[str, object] | None = None, rows: int = 4) -> PrecisionGraph:
    """`ops` of the root, each on what the one before it gave."""
    made, read = PrecisionGraph(), "x"
    made.add_input(Value("x", "fp32", (rows,), rows, role="input"))
    for number, op in enumerate(ops):
        made.add(
            Node(f"n{number}", f"aten.{op}", [read], attrs=dict(told or {})),
            [Value(f"v{number}", "fp32", (rows,), rows)],
        )
        read = f"v{number}"
    return made


@pytest.mark.parametrize(
    ("was", "now", "why"),
    [
        (("relu", "tanh"), ("tanh", "relu"), "reads"),
        (("relu", "tanh"), ("relu", "exp"), "nothing was measured of it"),
        (("relu", "exp", "tanh"), ("relu", "tanh"), "reads relu"),
        (("relu", "tanh"), ("relu", "relu", "tanh"), "nothing was measured of it"),
        (("relu", "tanh"), ("dropout", "relu", "clone", "tanh"), ""),
        (("relu", "dropout", "tanh"), ("relu", "tanh"), ""),
    ],
)
def test_the_order_of_operations_is_held_against_what_was(was: tuple[str, ...], now: tuple[str, ...], why: str) -> None:
    made = Ranges(graphs=[measured_graph(chain(*(f"{op}.default" for op in was)))])
    given = chain(*(f"{op}.default" for op in now))
    if not why:
        return made.check_graph(given)
    with pytest.raises(RuleError, match="MP207") as caught:
        made.check_graph(given)
    assert why in str(caught.value)


@pytest.mark.parametrize(
    ("name", "was", "now", "rows", "alike"),
    [
        ("other", 1.0, 1e8, 4, False),
        ("other", 1.0, 1e8, 8, False),
        ("other", 1.0, 2.0, 4, True),
        ("other", 1.0, -1.0, 4, False),
        ("other", 0.0, 1.0, 4, False),
        ("value", float("-inf"), float("-inf"), 4, True),
        ("value", float("-inf"), -1e9, 4, False),
        ("other", 4, 8, 4, False),  # the inputs are as they were, and the number is not
        ("other", 4, 8, 8, True),  # a number that comes from the batch
        ("exponent", 2, 4, 8, False),
        ("size", (4, 2, 8), (4, 8, 2), 4, False),
        ("size", (4, 2, 8), (8, 2, 8), 8, True),
        ("size", (4, 2, 8), (4, 16), 8, False),
        ("size", (4, 2), ("s0", 2), 8, True),
        ("dims", (0, 2, 1), (1, 0, 2), 8, False),
        ("keepdim", True, False, 8, False),
        ("approximate", "none", "tanh", 8, False),
        ("training", True, False, 4, True),
        ("dropout_p", 0.1, 0.0, 4, True),
    ],
)
def test_what_a_node_is_told_is_held_against_what_it_was(
    name: str, was: object, now: object, rows: int, alike: bool
) -> None:
    made = Ranges(graphs=[measured_graph(chain("op", told={name: was}))])
    given = chain("op", told={name: now}, rows=rows)
    if alike:
        return made.check_graph(given)
    with pytest.raises(RuleError, match="MP207") as caught:
        made.check_graph(given)
    assert name in str(caught.value)


@pytest.mark.parametrize(
    ("names", "shapes", "alike"),
    [
        (("a", "b"), ((4,), (4,)), False),
        (("a", "tied"), ((4,), (4,)), True),  # a second name of a shared one
        (("a", "tied"), ((4,), (8,)), False),
        (("a", "a"), ((4,), (4,)), True),
    ],
)
def test_parameters_are_known_by_name_or_where_shared_by_shape(
    names: tuple[str, str], shapes: tuple[tuple[int], tuple[int]], alike: bool
) -> None:
    def reading(name: str, shape: tuple[int]) -> PrecisionGraph:
        made = PrecisionGraph()
        made.add_input(Value(name, "fp32", shape, 4, role="parameter"))
        made.add(Node("n", "aten.exp.default", [name]), [Value("v", "fp32", shape, 4)])
        return made

    was, now = (reading(name, shape) for name, shape in zip(names, shapes, strict=True))
    made = Ranges(parameters={"a": (4,), "b": (4,)}, graphs=[measured_graph(was)])
    if alike:
        return made.check_graph(now)
    with pytest.raises(RuleError, match="reads parameter"):
        made.check_graph(now)


def test_what_a_loss_function_computes_is_refused_by_nobody_and_known_only_if_measured() -> None:
    made = Ranges({"loss_fn:|aten.exp|0": size(20)}, graphs=[measured_graph(chain("relu", "exp"), {"n1"})])
    same, _ = made.found(chain("relu", "exp"), "fp16", {"n1"})
    assert same["v1"].most == 2.0**20
    for other in (chain("relu", "tanh", "exp"), chain("relu", "tanh")):
        assert made.found(other, "fp16", {"n1", "n2"}) == ({}, {})


def test_a_piece_of_a_graph_takes_what_was_measured_of_all_the_like() -> None:
    keys = [key for key, _ in keyed(graph("a", "a", "b"))]
    made = Ranges(
        {keys[0]: size(0), keys[1]: size(20), keys[2]: size(1)},
        {keys[1]: size(40)},
        graphs=[measured_graph(graph("a", "a", "b"))],
    )
    whole, _ = made.found(graph("a", "a", "b"), "fp16")
    assert [whole[name].most for name in ("v0", "v1", "v2")] == [1.0, 2.0**20, 2.0]
    # Behind a graph break the second of `a` is the first.
    piece, gradients = made.found(graph("a", "b"), "fp16", piece=True)
    assert [piece[name].most for name in ("v0", "v1")] == [2.0**20, 2.0]
    assert gradients.keys() == {"v0"}


def test_a_file_that_holds_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    for text in (
        "",
        "[]",
        "{}",
        '{"schema": "other/1"}',
        '{"schema": "mpcompile.ranges/1"}',
        '{"schema": "mpcompile.ranges/2", "values": {"a": 3}}',
    ):
        path.write_text(text)
        with pytest.raises(RuleError, match="MP208"):
            Ranges.load(path)
    with pytest.raises(RuleError, match="MP208"):
        Ranges.load(tmp_path / "absent.json")
    with pytest.raises(RuleError, match="MP208"):
        Ranges.load(3)
    Ranges(batches=2).save(path)
    assert Ranges.load(str(path)).batches == 2
    assert [one.name for one in tmp_path.iterdir()] == ["r.json"]


def test_ranges_that_cannot_be_saved_leave_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "ranges.json").mkdir()
    with pytest.raises(IsADirectoryError):
        Ranges().save(tmp_path / "ranges.json")
    assert [one.name for one in tmp_path.iterdir()] == ["ranges.json"]
