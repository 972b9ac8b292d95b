"""The rules against the installed torch's own autocast: its lists, row by row, and what it really does to each op."""

from __future__ import annotations

import itertools
import tomllib
from collections.abc import Iterator
from importlib import resources
from typing import Any

import pytest
import torch
from autocast_lists import header_lists, registered
from opsweep import traced
from oracle import output_dtypes
from torch import fx
from torch.utils import _pytree as pytree

from mpcompile.aten.facts import op_name
from mpcompile.rules import Rule, rules_for

DIFFERENCES = tomllib.loads(resources.files("mpcompile.rules").joinpath("differences.toml").read_text())
VERDICT = {"lower": "low", "fp32": "fp32", "set_dtype": "fp32", "promote": "propagate"}
# The CPU's lists stand in torch's C++ only; what is registered and not named here is on its FP32 list.
CPU_LOWER = (
    "conv1d", "conv1d.padding", "conv2d", "conv2d.padding", "conv3d", "conv3d.padding", "bmm", "mm",
    "linalg_vecdot", "baddbmm", "addmm", "_addmm_activation", "addbmm", "linear", "_convolution.deprecated",
    "matmul", "conv_tbc", "mkldnn_rnn_layer", "conv_transpose1d", "conv_transpose2d.input",
    "conv_transpose3d.input", "prelu", "scaled_dot_product_attention", "_native_multi_head_attention",
)  # fmt: skip
CPU_PROMOTE = ("stack", "cat", "index_copy")


def full(name: str) -> str:
    return name if "." in name else f"{name}.default"


def short(name: str) -> str:
    return name.removesuffix(".default")


def cpu_lists() -> dict[str, str]:
    lower, promote = {full(n) for n in CPU_LOWER}, {full(n) for n in CPU_PROMOTE}
    return {op: "lower" if op in lower else "promote" if op in promote else "fp32" for op in registered("CPU")}


LISTS = {"cuda": header_lists, "cpu": cpu_lists}


def row(op: str) -> Rule:
    found = rules_for("aten").get(f"aten.{full(op)}")
    assert found is not None, op
    return found


def test_the_lists_are_what_the_dispatcher_has() -> None:
    assert header_lists().keys() == registered("CUDA")
    assert {full(n) for n in (*CPU_LOWER, *CPU_PROMOTE)} <= registered("CPU")


@pytest.mark.parametrize("device", LISTS)
@pytest.mark.parametrize("low", ["bf16", "fp16"])
def test_each_difference_from_a_list_has_a_reason(device: str, low: str) -> None:
    lists = LISTS[device]()
    different = {short(op) for op, name in lists.items() if row(op).verdict_for(low) != VERDICT[name]}
    assert different == set(DIFFERENCES[device])
    assert all(len(reason) > 20 for reason in DIFFERENCES[device].values())


def test_the_autocast_column_is_torch_s_list() -> None:
    lists = header_lists()
    assert {op: row(op).autocast for op in lists} == lists


def test_what_else_has_an_autocast_column_is_made_of_listed_operations() -> None:
    lists, through = header_lists(), DIFFERENCES["through"]
    packets = {op.partition(".")[0] for op in lists}
    rows = {r.op.removeprefix("aten."): r for r in rules_for("aten") if r.autocast and r.op.startswith("aten.")}
    more = {op for op in rows if full(op) not in lists and (op not in packets or op in through)}
    assert {short(op) for op in more} == set(through)
    for op, inner in through.items():
        wanted = "lower" if inner == "_cudnn_rnn" else lists[full(inner)]
        assert VERDICT[row(op).autocast] == VERDICT[wanted], op


def test_low_beyond_the_lists_has_a_reason_by_kind() -> None:
    kinds = {r.kind.name for r in rules_for("aten") if r.verdict_for("bf16") == "low" and not r.autocast}
    assert kinds == set(DIFFERENCES["low"])


def floating_inputs(node: fx.Node) -> bool:
    values = pytree.tree_leaves([n.meta.get("val") for n in node.all_input_nodes])
    return any(isinstance(v, torch.Tensor) and v.dtype == torch.float32 for v in values)


def nodes(most: int) -> Iterator[fx.Node]:
    """One node of every ATen overload with floating operands that OpInfo reaches."""
    seen: set[str] = set()
    for module in itertools.chain(*traced(most)[0].values()):
        for node in module.graph.nodes:
            op = op_name(node.target)
            if op not in seen and isinstance(node.target, torch._ops.OpOverload) and floating_inputs(node):
                seen.add(op)
                yield node


def first_float(dtypes: list[torch.dtype]) -> torch.dtype | None:
    return next((d for d in dtypes if d in (torch.float32, torch.bfloat16)), None)


def real_treatment(node: fx.Node) -> str | None:
    """What CUDA autocast does to an op: "low", "fp32", "propagate"; None where it cannot run or gives no floats."""
    given: list[Any] = []
    for floats in (torch.bfloat16, torch.float32):
        try:
            given.append(first_float(output_dtypes(node, floats)))
        except Exception:
            return None
    known = {
        (torch.bfloat16, torch.bfloat16): "low",
        (torch.float32, torch.float32): "fp32",
        (torch.bfloat16, torch.float32): "propagate",
    }
    return known.get((given[0], given[1]))


# What gives one dtype for a reason of its own: the program's casts, and window, spacing and dtype arguments.
TOLD = {
    "aten.to.dtype", "aten.to.device", "aten.linspace.Tensor_Scalar", "aten.linspace.Tensor_Tensor",
    "aten.stft.default", "aten._softmax_backward_data.default",
}  # fmt: skip


@pytest.mark.slow
def test_the_autocast_column_is_what_cuda_autocast_does() -> None:
    compared, wrong = 0, {}
    for node in nodes(1):
        op, real = op_name(node.target), real_treatment(node)
        rule = rules_for("aten").get(op)
        if real is None or rule is None or op in TOLD:
            continue
        compared += 1
        if VERDICT.get(rule.autocast, "propagate") != real:
            wrong[op] = (rule.autocast, real)
    assert compared > 350
    assert wrong == {}
