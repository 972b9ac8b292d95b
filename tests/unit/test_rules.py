"""The rules as data: how rows are read, found and registered, and custom ops that bring their own autocast rule."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterator
from importlib import resources

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpcompile import mpcompile
from mpcompile.aten.flops import FORMULAS
from mpcompile.errors import RuleError
from mpcompile.graph import Node
from mpcompile.onnx.read import facts as onnx_facts
from mpcompile.rules import register, rules_for
from mpcompile.rules.table import Kind, Rule, Rules, load_kinds

KINDS = {
    "matmul": Kind("matmul", "low", "units"),
    "sum": Kind("sum", "propagate", "adds", per_precision={"fp16": "fp32"}),
}


def table(text: str) -> Rules:
    rules = Rules(KINDS, {})
    for op, row in tomllib.loads(text).items():
        rules.set(rules.rule(op, row))
    return rules


def test_a_row_may_be_a_kind_or_a_table_of_facts() -> None:
    rules = table('"aten.mm" = "matmul"\n"aten.norm" = { kind = "sum", fp32_operands = [1, 2], reason = "why" }')
    assert rules.get("aten.mm.default") == Rule("aten.mm", KINDS["matmul"])
    norm = rules.get("aten.norm.default")
    assert norm is not None
    assert (norm.fp32_operands, norm.why(), norm.verdict_for("bf16"), norm.verdict_for("fp16")) == (
        (1, 2), "why", "propagate", "fp32",
    )  # fmt: skip


def test_an_overload_s_own_row_comes_first() -> None:
    rules = table('"aten.f" = "matmul"\n"aten.f.x" = { kind = "sum", verdict = "low" }')
    assert [r.kind.name for r in map(rules.get, ("aten.f.x", "aten.f.y")) if r] == ["sum", "matmul"]
    assert rules.get("aten.g.x") is None


def test_an_in_place_op_has_its_twin_s_row_without_the_autocast_list() -> None:
    rules = table('"aten.f" = { kind = "matmul", autocast = "lower" }\n"aten.copy_" = "sum"')
    twin = rules.get("aten.f_.default")
    assert twin is not None
    assert (twin.kind.name, twin.autocast) == ("matmul", "")
    assert rules.get("aten.copy_.default").kind.name == "sum"  # type: ignore[union-attr]
    assert rules.get("aten.__f__.default") is None


@pytest.mark.parametrize(
    "row", ['"x" = "no-kind"', '"x" = { kind = "sum", verdict = "lower" }', '"x" = { verdict = "low" }']
)
def test_a_bad_row_is_refused(row: str) -> None:
    with pytest.raises(RuleError, match="MP202"):
        table(row)


def test_a_near_name_of_a_kind_is_suggested() -> None:
    with pytest.raises(RuleError, match="matmul"):
        register("mylib::near", "matmull")


def test_register_wants_a_kind_or_a_verdict_with_its_reason() -> None:
    for wrong in ({}, {"verdict": "low"}, {"reason": "because"}):
        with pytest.raises(RuleError, match="MP202"):
            register("mylib::half", **wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("source", ["aten", "onnx"])
def test_every_row_and_kind_can_be_explained(source: str) -> None:
    kinds = load_kinds()
    assert all(kind.reason and kind.verdict in ("low", "fp32", "propagate") for kind in kinds.values())
    assert all(rule.why() for rule in rules_for(source))
    low = {rule.kind.name for rule in rules_for(source) if rule.verdict_for("bf16") == "low"}
    assert {"matmul", "convolution"} <= low <= {"matmul", "convolution", "attention", "rnn", "custom"}


# Products that no formula prices: what autograd makes (its forward was priced), and these.
UNPRICED = {
    "aten._foreach_mm", "aten._trilinear", "aten.conv_tbc", "transformers.grouped_mm_fallback",
    "aten.mkldnn_rnn_layer", "aten._cudnn_rnn", "aten._thnn_fused_gru_cell", "aten._thnn_fused_lstm_cell",
    "aten._cudnn_attention_forward", "aten._efficient_attention_forward", "aten._flash_attention_forward",
    "aten._native_multi_head_attention", "aten._triton_multi_head_attention",
}  # fmt: skip


def test_every_product_names_a_formula() -> None:
    """Without one it is low whatever it costs; a new row must say which of the two it is."""
    low = [rule for rule in rules_for("aten") if rule.kind.verdict == "low"]
    assert len(low) > 100
    assert [rule.op for rule in low if rule.flops not in {*FORMULAS, "recurrent", "none"}] == []
    unpriced = {rule.op for rule in low if rule.flops == "none" and "backward" not in rule.op}
    assert unpriced == UNPRICED
    named = {rule.op.rpartition("::")[2] for rule in rules_for("onnx") if rule.flops not in ("", "none")}
    assert named == set(onnx_facts.FLOPS)
    assert all(rule.flops for rule in rules_for("onnx") if rule.kind.verdict == "low")


@pytest.mark.parametrize("source", ["aten"])
def test_operands_have_the_schema_s_names(source: str) -> None:
    text = resources.files("mpcompile.rules").joinpath(f"{source}.toml").read_text(encoding="utf-8")
    checked = 0
    for op, row in tomllib.loads(text).items():
        for field in ("fp32_operands", "any_operands"):
            named = row.get(field, {}) if isinstance(row, dict) else {}
            namespace, _, packet = op.partition(".")
            packet, _, overload = packet.partition(".")
            for name, slot in named.items():
                found = getattr(getattr(torch.ops, namespace), packet)
                schema = getattr(found, overload or found.overloads()[0])._schema
                assert schema.arguments[slot].name == name, op
                checked += 1
    assert checked > 80


A, B, V = torch.randn(4, 4), torch.randn(4, 4), torch.randn(4)
SMALL: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...], int]] = {
    "linear": (F.linear, (A, B), 128),
    "einsum": (lambda a, b: torch.einsum("ij,jk->ik", a, b), (A, B), 128),
    "einsum of batches": (lambda a, b: torch.einsum("...ij,...jk->...ik", a, b), (A[None], B[None]), 128),
    "inner": (torch.inner, (A, B), 128),
    "addmv": (torch.addmv, (V, A, V), 32),
    "tensordot": (lambda a, b: torch.tensordot(a, b, dims=([1], [0])), (A, B), 128),
    "bilinear": (F.bilinear, (A, B, torch.randn(3, 4, 4)), 2 * 4 * 48),
    "addr": (torch.addr, (A, V, V), 32),
    "baddbmm": (torch.baddbmm, (A[None], A[None], B[None]), 128),
    "multi_dot": (lambda *ms: torch.linalg.multi_dot(ms), (A, B, A), 256),
}


@pytest.mark.parametrize("name", SMALL)
def test_a_small_product_stays_fp32_on_a_processor_whatever_it_is_called(name: str) -> None:
    """Its price says so; where low calls are free the same product is low."""
    call, tensors, flops = SMALL[name]

    class Net(nn.Module):
        def forward(self, *tensors: Tensor) -> Tensor:
            return call(*tensors)

    def products(row: str) -> list[Node]:
        plan = mpcompile(Net(), f"bf16,device={row}", backend="eager").plan(*tensors)
        return [node for node in plan.graph if node.kind == "matmul"]

    assert [node.precision for node in products("cpu")] == ["fp32"] * len(products("cpu"))
    assert sum(node.flops for node in products("cpu")) == flops
    assert any(node.precision == "bf16" for node in products("free-low"))


@torch.library.custom_op("mptest::halved", mutates_args=())
def halved(x: Tensor) -> Tensor:
    return x / 2


@torch.library.custom_op("mptest::exact", mutates_args=())
def exact(x: Tensor) -> Tensor:
    return x + 0.125


@torch.library.custom_op("mptest::plain", mutates_args=())
def plain(x: Tensor) -> Tensor:
    return x * 2


@torch.library.custom_op("mptest::known", mutates_args=())
def known(x: Tensor) -> Tensor:
    return x * 3


for _op in (halved, exact, plain, known):
    _op.register_fake(torch.empty_like)
    _op.register_autograd(lambda ctx, grad: grad)
halved.register_autocast("cpu", torch.bfloat16)
torch.library.register_autocast("mptest::exact", "cpu", torch.float32)
known.register_autocast("cpu", torch.float32)


@pytest.fixture(scope="module")
def bare() -> Iterator[torch.library.Library]:
    """An op made with a bare `Library`, which torch knows no `CustomOpDef` of."""
    library = torch.library.Library("mptestlib", "DEF")
    library.define("triple(Tensor x) -> Tensor")
    library.impl("triple", lambda x: x * 3, "CompositeExplicitAutograd")
    torch.library.register_autograd("mptestlib::triple", lambda ctx, grad: grad * 3, lib=library)
    torch.library.register_autocast("mptestlib::triple", "cpu", torch.bfloat16, lib=library)
    yield library
    library._destroy()


class Net(nn.Module):
    def __init__(self, op: object) -> None:
        super().__init__()
        self.first, self.last, self.op = nn.Linear(64, 64), nn.Linear(64, 64), op

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.op(self.first(x)))  # type: ignore[operator, no-any-return]


def node_of(op: object, policy: str = "bf16", **options: object) -> dict[str, object]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Net(op)
    mp = mpcompile(model, policy, backend="eager", **options)
    x = torch.randn(512, 64)
    torch.testing.assert_close(mp(x), model(x), rtol=0.05, atol=0.05)
    mp(x).sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
    nodes = mp.report(x).to_dict()["nodes"]
    return next(n for n in nodes if n["op"].startswith("mptest"))


@pytest.mark.parametrize("policy", ["bf16", "low=bf16,plan=autocast"])
def test_register_autocast_is_honoured(policy: str) -> None:
    low = node_of(halved, policy)
    assert (low["verdict"], low["precision"], low["decided_by"]) == ("low", "bf16", "rule")
    assert "register_autocast" in str(low["reason"])
    high = node_of(exact, policy)
    assert (high["verdict"], high["precision"], high["decided_by"]) == ("fp32", "fp32", "rule")


def test_register_autocast_of_a_bare_library_is_honoured(bare: torch.library.Library) -> None:
    assert node_of(torch.ops.mptestlib.triple)["precision"] == "bf16"


def test_an_op_that_nobody_registered_is_fp32_and_unknown() -> None:
    node = node_of(plain)
    assert (node["precision"], node["decided_by"]) == ("fp32", "unknown")
    assert "mpcompile.rules.register" in str(node["reason"])
    with pytest.raises(Exception, match="MP205"):
        node_of(plain, strict=True)


def test_our_own_registration_comes_before_torch_s() -> None:
    register("mptest::known", verdict="low", reason="its author says so")
    node = node_of(known)
    assert (node["verdict"], node["precision"], node["reason"]) == ("low", "bf16", "its author says so")
