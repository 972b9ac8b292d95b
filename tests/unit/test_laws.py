"""Each law finds what breaks it, names node, module and source line, and shows the line."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from mpcompile import laws
from mpcompile.errors import LawError, pages
from mpcompile.graph import PrecisionGraph
from mpcompile.parse import parse_graph

GRAPH = """
graph source=fx
input x: fp32[8, 64]
input w: fp32[64, 64] <role='parameter'>
input ids: int64[8]
x_bf16: bf16[8, 64] = mp.cast(x) {'to': 'bf16'} | propagate bf16 cast rule origin='inserted'
w_bf16: bf16[64, 64] = mp.cast(w) {'to': 'bf16'} | propagate bf16 cast rule origin='shadow'
mm: bf16[8, 64] <alias='s'> = aten.mm.default(x_bf16, w_bf16) | low bf16 matmul rule @ head 'model.py:4' group='g'
mm_fp32: fp32[8, 64] = mp.cast(mm) {'to': 'fp32'} | propagate fp32 cast rule origin='inserted'
his: bf16[8, 64] = aten.to.dtype(mm_fp32) {'dtype': 'bf16'} | propagate fp32 cast user-cast out_dtype='bf16'
exp: fp32[8, 64] = aten.exp.default(mm_fp32) | fp32 fp32 exponential rule @ head 'model.py:5'
step: fp32[8, 64] = aten.add_.Tensor(exp, exp) | fp32 fp32 elementwise rule phase='optimizer'
loss: fp32[] = aten.mse_loss.default(step, exp) | fp32 fp32 loss rule
return mm_fp32, his, loss
"""


def before() -> PrecisionGraph:
    graph = parse_graph(GRAPH)
    for cast in graph.casts():
        del graph.nodes[cast.id], graph.values[cast.outputs[0]]
        for node in graph:
            node.inputs = [cast.inputs[0] if n == cast.outputs[0] else n for n in node.inputs]
        graph.outputs = [cast.inputs[0] if n == cast.outputs[0] else n for n in graph.outputs]
    return graph


def reads_low(graph: PrecisionGraph) -> None:
    graph.nodes["exp"].inputs = ["mm"]


def gives_low(graph: PrecisionGraph) -> None:
    graph.values["exp"].dtype = "bf16"


def reads_low_where_fp32_is_fixed(graph: PrecisionGraph) -> None:
    """A low node may have operands that stay FP32 whatever it is."""
    graph.nodes["mm"].operands = {graph.nodes["mm"].slots[1]: "fp32"}


def undecided(graph: PrecisionGraph) -> None:
    graph.nodes["exp"].precision = ""


def casts_integers(graph: PrecisionGraph) -> None:
    graph.nodes["x_bf16"].inputs = ["ids"]


def casts_to_nothing(graph: PrecisionGraph) -> None:
    graph.nodes["x_bf16"].attrs["to"] = "int64"
    graph.values["x_bf16"].dtype = "int64"


def casts_twice(graph: PrecisionGraph) -> None:
    graph.nodes["w_bf16"].inputs = ["x"]


def casts_to_itself(graph: PrecisionGraph) -> None:
    graph.values["x"].dtype = "bf16"


def reads_stale(graph: PrecisionGraph) -> None:
    graph.values["exp"].alias = "s"
    graph.values["step"].alias = "s"
    graph.values["mm"].dtype = "fp32"  # keeps one precision per storage
    graph.nodes["mm"].precision = graph.nodes["mm"].gives_at(0)  # type: ignore[assignment]
    graph.nodes["loss"].inputs = ["mm_fp32", "exp"]


def casts_a_cast(graph: PrecisionGraph) -> None:
    graph.nodes["mm_fp32"].inputs = ["x_bf16"]


def loses_the_users_cast(graph: PrecisionGraph) -> None:
    del graph.nodes["his"], graph.values["his"]
    graph.outputs = ["mm_fp32", "mm_fp32", "loss"]


def swaps_outputs(graph: PrecisionGraph) -> None:
    graph.outputs = ["his", "mm_fp32", "loss"]


def changes_an_input(graph: PrecisionGraph) -> None:
    graph.values["ids"].dtype = "int32"


def gives_a_low_output(graph: PrecisionGraph) -> None:
    graph.outputs[0] = "mm"


def optimizes_low(graph: PrecisionGraph) -> None:
    graph.nodes["step"].precision = "bf16"


def loses_low(graph: PrecisionGraph) -> None:
    graph.nodes["loss"].precision = "bf16"


def reads_before(graph: PrecisionGraph) -> None:
    graph.rebuild_order(reversed(list(graph)))


def makes_twice(graph: PrecisionGraph) -> None:
    graph.nodes["exp"].outputs = ["mm"]


def forgets_an_output(graph: PrecisionGraph) -> None:
    graph.outputs[0] = "nothing"


def splits_storage(graph: PrecisionGraph) -> None:
    graph.values["exp"].alias = "s"


def splits_a_group(graph: PrecisionGraph) -> None:
    graph.nodes["exp"].group = "g"


BREAKS: dict[Callable[[PrecisionGraph], None], str] = {
    reads_low: "MP401", gives_low: "MP401", undecided: "MP401", reads_low_where_fp32_is_fixed: "MP401",
    casts_integers: "MP402", casts_to_nothing: "MP402",
    casts_twice: "MP403", casts_to_itself: "MP403",
    reads_stale: "MP407",
    casts_a_cast: "MP404", loses_the_users_cast: "MP404",
    swaps_outputs: "MP405", changes_an_input: "MP405", gives_a_low_output: "MP405",
    optimizes_low: "MP406", loses_low: "MP406",
    reads_before: "MP410", makes_twice: "MP410", forgets_an_output: "MP410",
    splits_storage: "MP411", splits_a_group: "MP411",
}  # fmt: skip


def test_the_sound_graph_passes() -> None:
    laws.verify(parse_graph(GRAPH), before(), output="fp32")


@pytest.mark.parametrize("harm", BREAKS, ids=lambda f: f.__name__)
def test_each_breach_is_found(harm: Callable[[PrecisionGraph], None]) -> None:
    graph = parse_graph(GRAPH)
    harm(graph)
    found = {breach.code for breach in laws.breaches(graph, before(), output="fp32")}
    assert BREAKS[harm] in found
    with pytest.raises(LawError):
        laws.verify(graph, before(), output="fp32")


def test_the_error_names_node_module_and_line_and_shows_the_text() -> None:
    graph = parse_graph(GRAPH)
    reads_low(graph)
    with pytest.raises(LawError, match=r"MP401: node 'exp' reads 'mm' as bf16, but needs fp32") as caught:
        laws.verify(graph)
    assert caught.value.where == "node exp, module head, model.py:5"
    assert "exp: fp32[8, 64] = aten.exp.default(mm) | fp32 fp32" in caught.value.__notes__[0]


def test_every_code_has_a_page() -> None:
    assert {f"MP40{n}" for n in (1, 2, 3, 4, 5, 6, 7, 8)} | {"MP410", "MP411"} <= set(pages())


@pytest.mark.parametrize(("op", "kind", "writes"), [
    ("aten.add_.Tensor", "elementwise", True), ("aten.view.default", "shape", False), ("aten.exp.default", "", False),
    ("aten.add.out", "elementwise", True), ("mylib.update.default", "custom", True), ("onnx::Identity", "shape", False),
    ("aten.dropout.default", "random", False),
])  # fmt: skip
def test_who_writes_to_storage(op: str, kind: str, writes: bool) -> None:
    graph = parse_graph(
        f"graph\ninput x: fp32[2] <alias='s'>\ny: fp32[2] = {op}(x) | ? ? {kind or '?'} rule\nreturn y\n"
    )
    assert (laws.writes(graph, graph.nodes["y"]) == {"s"}) is writes
