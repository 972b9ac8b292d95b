"""Every op that capture can reach has a row: torch's OpInfo database, and what transformers' architectures produce."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import pytest
import torch
from opsweep import traced
from torch import fx
from zoo import ARCHITECTURES, build

from mpcompile.aten.capture import export
from mpcompile.aten.exported import inline_regions
from mpcompile.aten.facts import op_name
from mpcompile.rules import rules_for

# OpInfos whose samples cannot be traced on a CPU with fake tensors, and why; a failure outside this table is an error.
UNTRACEABLE = {
    "allclose": "gives a Python bool", "equal": "gives a Python bool",
    "corrcoef": "asks for a Python bool", "cov": "asks for a Python bool",
    "linalg.lstsq": "its output's shape depends on the data", "nn.functional.ctc_loss": "reads lengths as numbers",
    "nn.functional.gaussian_nll_loss": "asks for a Python bool",
    "nn.functional.one_hot": "its output's shape depends on the data",
    "tensor_split": "takes its sections from a tensor", "narrow": "takes its start from a tensor",
    "jiterator_2inputs_2outputs": "CUDA only", "jiterator_4inputs_with_extra_args": "CUDA only",
    "jiterator_binary": "CUDA only", "jiterator_binary_return_by_ref": "CUDA only", "jiterator_unary": "CUDA only",
}  # fmt: skip
# What those reach, named by hand.
NAMED = (
    "aten.allclose.default", "aten.equal.default", "aten.linalg_lstsq.default", "aten.ctc_loss.Tensor",
    "aten.ctc_loss.IntList", "aten._ctc_loss.default", "aten.one_hot.default", "aten.tensor_split.indices",
    "aten.tensor_split.sections", "aten.narrow.default", "aten.narrow.Tensor", "aten.cov.default",
    "aten.corrcoef.default",
)  # fmt: skip
QUICK = ("gpt2", "llama", "t5", "vit", "resnet", "mixtral")


def ops_of(graph: fx.Graph) -> set[str]:
    return {op_name(node.target) for node in graph.nodes if node.op == "call_function"}


def without_row(ops: Iterable[str]) -> list[str]:
    rules = rules_for("aten")
    return sorted(op for op in ops if rules.get(op) is None)


@pytest.mark.parametrize("most", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_every_op_of_the_opinfo_database_has_a_row(most: int) -> None:
    graphs, failed = traced(most)
    found: dict[str, set[str]] = defaultdict(set)
    for name, modules in graphs.items():
        for op in set().union(*(ops_of(module.graph) for module in modules)):
            found[op].add(name)
    assert len(found) > 550, "the sweep reached too little to mean anything"
    assert {op: found[op] for op in without_row(found)} == {}
    assert failed - set(UNTRACEABLE) == set()
    assert without_row(NAMED) == []


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in ARCHITECTURES])
def test_every_op_of_an_architecture_has_a_row(name: str) -> None:
    model, inputs = build(name)
    module = export(model, (), inputs).module()
    inline_regions(module)
    assert len(ops_of(module.graph)) > 5
    assert without_row(ops_of(module.graph)) == []


def test_an_in_place_op_has_the_row_of_its_functional_twin() -> None:
    rules = rules_for("aten")
    for name in ("aten.add_.Tensor", "aten.relu_.default", "aten.scatter_add_.default", "aten.exp_.default"):
        twin = rules.get(name.replace("_.", "."))
        assert twin is not None
        assert rules.get(name) is not None
        assert rules.get(name).kind is twin.kind  # type: ignore[union-attr]
    assert rules.get("aten.exp_.default").autocast == ""  # type: ignore[union-attr]
    assert rules.get("aten.no_such_.default") is None
    assert rules.get("mylib.__and__.default") is None


def test_rows_name_operations_that_exist() -> None:
    names = [name.partition("::") for name in torch._C._dispatch_get_all_op_names()]
    known = {name.partition(".")[0] for space, _, name in names if space == "aten"}
    rows = [rule.op.split(".") for rule in rules_for("aten") if rule.op.startswith("aten.")]
    assert [".".join(row) for row in rows if row[1] not in known and row[1] + "_" not in known] == []
    overloads = [(row[1], row[2]) for row in rows if len(row) == 3]
    assert [row for row in overloads if row[1] not in getattr(torch.ops.aten, row[0]).overloads()] == []
