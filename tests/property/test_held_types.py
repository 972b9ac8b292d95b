"""`legalize` and `measured-hazards` on random programs with random types and ranges."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from strategies import floats_of, front_end_graphs

from mpcompile.formats import CASTABLE, LARGEST, LOW
from mpcompile.graph import PrecisionGraph
from mpcompile.passes.classify import Classify
from mpcompile.passes.legalize import Legalize
from mpcompile.passes.measured_hazards import Measured, MeasuredHazards
from mpcompile.passes.normalize import Normalize
from mpcompile.pipeline import honest, run, together, verify_each
from mpcompile.signature import Signature

lows = st.sampled_from(sorted(LOW))
types = st.frozensets(st.sampled_from(["fp32", "fp16", "bf16"])).map(lambda found: found | {"fp32"})


def after(graph: PrecisionGraph, *passes: Any) -> PrecisionGraph:
    before, _ = run(graph, [Normalize(), Classify(passes[0].low)], verify_each)
    return run(before, passes, together(verify_each, honest(before)))[0]


@given(front_end_graphs(), lows, st.data())
def test_no_type_is_low_that_the_schema_refuses(graph: PrecisionGraph, low: str, data: st.DataObject) -> None:
    """One type variable a node, random types for it; and a second run finds nothing to do."""
    allowed = {node.id: data.draw(types) for node in graph}
    signatures = {
        key: Signature(("T",), ("T",), {"T": found}, variadic=True, variadic_out=True) for key, found in allowed.items()
    }
    one = Legalize(low, signatures)
    result = after(graph, one)
    for node in result:
        floats = CASTABLE.intersection(result.values[name].dtype for name in (*node.inputs, *node.outputs))
        if floats and low not in allowed.get(node.id, ()) and node.kind != "cast" and not node.is_cast:
            assert node.verdict == "fp32"
    assert not run(result, [one])[1][0].modified


@given(front_end_graphs(), lows, st.data())
def test_what_overflowed_stays_fp32_with_its_readers(graph: PrecisionGraph, low: str, data: st.DataObject) -> None:
    names = floats_of(graph)
    large = set(data.draw(st.lists(st.sampled_from(names), max_size=3))) if names else set()
    ranges = {name: Measured(-1.0, LARGEST[low] * 1.5 if name in large else 1.0) for name in names}
    result = after(graph, MeasuredHazards(low, ranges))
    for node in result:
        free = node.kind != "cast" and not node.is_cast and not node.out_dtype
        if (
            free
            and node.decided_by not in ("override", "user-cast")
            and large.intersection((*node.outputs, *node.inputs))
        ):
            found = next(name for name in (*node.outputs, *node.inputs) if name in large)
            assert node.verdict == "fp32" or not result.values[found].castable
