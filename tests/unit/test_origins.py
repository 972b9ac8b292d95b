"""What may be rounded: each sentence of the law on a graph of a few nodes, and what it must not cost."""

from __future__ import annotations

import pytest

from mpcompile import laws
from mpcompile.errors import LawError
from mpcompile.graph import PrecisionGraph
from mpcompile.parse import parse_graph
from mpcompile.pipeline import run, verify_each
from mpcompile.policy import Policy
from mpcompile.recipes import fx_passes

ROLES = {"x": "input", "w": "parameter", "b": "buffer", "c": "constant"}
INTEGERS, BOOLS = ("i",), ("m",)


def program(text: str, returned: str, **ranges: tuple[float, float]) -> PrecisionGraph:
    """Lines such as ``y = linear.default(x, w)``; x… are inputs, w… parameters, b… buffers, i… integers, m… bools.

    A name with `0` at its end has no dimension; a name that is made has the dtype that stands behind a colon, or FP32.
    """
    lines, made = ["graph source=fx"], {line.partition("=")[0].partition(":")[0].strip() for line in text.splitlines()}
    given = [name for name in dict.fromkeys(_operands(text)) if name not in made]
    lines += [f"input {_typed(name)} <{_rare(name, ranges)}>" for name in given]
    for line in filter(None, map(str.strip, text.splitlines())):
        name, _, call = line.partition(" = ")
        name, _, dtype = name.partition(":")
        lines.append(f"{name}: {dtype or 'fp32'}[64, 64] = aten.{call}")
    return parse_graph("\n".join([*lines, f"return {returned}"]) + "\n")


def _operands(text: str) -> list[str]:
    calls = [line.partition("(")[2].partition(")")[0] for line in text.splitlines()]
    return [part.strip() for call in calls for part in call.split(",") if part.strip()]


def _typed(name: str) -> str:
    dtype = "int64" if name.startswith(INTEGERS) else "bool" if name.startswith(BOOLS) else "fp32"
    return f"{name}: {dtype}[{'' if name.endswith('0') else '64, 64'}]"


def _rare(name: str, ranges: dict[str, tuple[float, float]]) -> str:
    known = f" range={ranges[name]!r}" if name in ranges else ""
    return f"role={ROLES.get(name[0], 'input')!r}{known}"


def planned(graph: PrecisionGraph, low: str = "bf16", **fields: str) -> PrecisionGraph:
    for node in graph:
        node.flops = 1 << 40 if "linear" in node.op else 0
    return run(graph, fx_passes(Policy(low, **fields), "free-low"), verify_each)[0]  # type: ignore[arg-type]


def origin(text: str, name: str = "y", low: str = "bf16", **ranges: tuple[float, float]) -> str:
    last = [line for line in text.splitlines() if line][-1].partition(" = ")[0].partition(":")[0]
    return planned(program(text, last, **ranges), low).values[name].origin


# h is rounded, r and s are rows, p is a probability, e a result of an FP32 node, z is made by the program.
KNOWN = """
h = linear.default(x, w)
k = linear.default(x, w)
r = embedding.default(w1, i)
s = embedding.default(w2, i)
p = sigmoid.default(x)
e = exp.default(h)
z = zeros.default() {'dtype': 'fp32'}
"""
ROUNDED = "o = linear.default(y, w)"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("y = linear.default(x, w)", "rounded"),
        ("y = relu.default(x)", "full"),
        ("y = relu.default(h)", "rounded"),
        ("y = gelu.default(h)", "rounded"),
        ("y = gelu.default(r)", "full"),  # nobody has rounded it
        ("y = tanh.default(w)", "full"),
        ("y = layer_norm.default(x)", "rounded"),
        ("y = softmax.int(h) {'dim': -1}", "rounded"),
        ("y = softmax.int(x) {'dim': -1}", "full"),
        ("y = exp.default(h)", "full"),
        ("y = sum.dim_IntList(h) {'dim': 1}", "full"),
        ("y = amax.default(h)", "rounded"),
        ("y = amax.default(x)", "full"),
        ("y = view.default(x)", "full"),
        ("y = view.default(h)", "rounded"),
        ("y = view.default(w)", "weight"),
        ("y = index.Tensor(w, i)", "row"),
        ("y = index.Tensor(h, i)", "rounded"),
        ("y = index.Tensor(x, i)", "full"),
        # number times value, dropout masks
        ("y = mul.Tensor(h) {'other': 3.0}", "rounded"),
        ("y = mul.Tensor(x) {'other': 3.0}", "full"),
        ("y = mul.Tensor(r) {'other': 3.0}", "row"),
        ("y = div.Tensor(h) {'other': 3.0}", "rounded"),
        ("y = dropout.default(x) {'p': 0.1}", "full"),
        ("y = dropout.default(h) {'p': 0.1}", "rounded"),
        # products of two
        ("y = mul.Tensor(h, k)", "rounded"),
        ("y = mul.Tensor(h, w)", "rounded"),
        ("y = div.Tensor(h, w)", "rounded"),
        ("y = mul.Tensor(h, x)", "full"),
        ("y = mul.Tensor(h, p)", "rounded"),  # a gate
        ("y = mul.Tensor(h, e)", "full"),  # of any size
        ("y = mul.Tensor(h, z)", "full"),  # where a state starts
        ("y = div.Tensor(h, p)", "full"),
        ("y = mul.Tensor(r, s)", "full"),
        ("y = mul.Tensor(w1, w2)", "full"),
        ("y = mul.Tensor(x, p)", "full"),
        ("y = pow.Tensor_Scalar(h) {'exponent': 3}", "rounded"),
        ("y = pow.Tensor_Scalar(h) {'exponent': -0.5}", "full"),
        # sums
        ("y = add.Tensor(h, k)", "rounded"),
        ("y = add.Tensor(h, w)", "rounded"),
        ("y = add.Tensor(h, r)", "rounded"),
        ("y = sub.Tensor(h, k)", "rounded"),
        ("y = add.Tensor(h) {'other': 1.0}", "rounded"),
        ("y = add.Tensor(h, x)", "full"),
        ("y = sub.Tensor(i, w)", "full"),  # integers are exact, and of any size
        ("y = add.Tensor(h, i)", "full"),
        ("y = mul.Tensor(i, w)", "full"),
        ("y = add.Tensor(h, z)", "full"),
        ("y = add.Tensor(h, e)", "full"),
        ("y = add.Tensor(w1, w2)", "full"),
        ("y = sub.Tensor(w1, w2)", "full"),
        ("y = sub.Tensor(r, s)", "full"),
        ("y = add.Tensor(w) {'other': 1.0}", "weight"),
        # one of several parts
        ("y = cat.default(h, x)", "full"),
        ("y = cat.default(h, w)", "rounded"),
        ("y = cat.default(h, z)", "rounded"),  # zeros are exact where they are only placed
        ("y = cat.default(r, s)", "row"),
        ("y = where.self(m, h, x)", "full"),
        ("y = where.self(m, h, k)", "rounded"),
        ("y = masked_fill.Scalar(h, m) {'value': -1e9}", "rounded"),
        ("y = constant_pad_nd.default(h) {'value': 0.0}", "rounded"),
        ("y = scatter_add.default(z, i, h)", "rounded"),  # FP32 inside, rounded once
        ("y = index_put.default(b, i, h)", "full"),  # in place on what is full
        ("y = avg_pool2d.default(x)", "full"),
        ("y = max_pool2d.default(h)", "rounded"),
        # the program's own casts
        ("y = to.dtype(h) {'dtype': 'fp32'}", "full"),
        ("y = to.dtype(w) {'dtype': 'fp32'}", "weight"),
        ("y:bf16 = to.dtype(x) {'dtype': 'bf16'}", "rounded"),
        ("y = to.dtype(i) {'dtype': 'fp32'}", "full"),
    ],
)  # fmt: skip
def test_the_origin_of(line: str, expected: str) -> None:
    assert origin(f"{KNOWN}\n{line}\no = linear.default(y, w)") == expected


def test_a_mask_of_zeros_and_ones_times_a_number_is_a_multiplier() -> None:
    assert (
        origin(
            f"{KNOWN}\nf = to.dtype(m) {{'dtype': 'fp32'}}\ng = mul.Tensor(f) {{'other': 1.25}}\ny = mul.Tensor(h, g)\n{ROUNDED}"
        )
        == "rounded"
    )


@pytest.mark.parametrize("drop", ["floor.default(g)", "bernoulli.p(b)"])
def test_a_random_mask_is_a_multiplier(drop: str) -> None:
    """Stochastic depth, as timm and transformers write it."""
    made = "t = rand.default() {'dtype': 'fp32'}\ng = add.Tensor(t) {'other': 0.9}"
    text = f"{KNOWN}\n{made}\nd = {drop}\ny = mul.Tensor(h, d)\n{ROUNDED}"
    assert origin(text) == "rounded"


@pytest.mark.parametrize(
    ("readers", "expected"),
    [
        ("o = layer_norm.default(y)", "rounded"),
        ("d = dropout.default(y) {'p': 0.1}\no = linear.default(d, w)", "rounded"),
        ("o = linear.default(y, w)", "rounded"),
        ("v = view.default(y)\no = layer_norm.default(v)\nq = add.Tensor(v, h)", "rounded"),
        ("v = add.Tensor(y, r)\no = layer_norm.default(v)", "rounded"),
        ("o = exp.default(y)", "full"),
        ("o = mul.Tensor(y, h)", "full"),
        ("v = add.Tensor(y, r)\no = exp.default(v)", "full"),
        ("v = add.Tensor(y, h)\no = exp.default(v)", "rounded"),
    ],
)
def test_a_sum_of_rows_is_rounded_where_it_is_read_gently(readers: str, expected: str) -> None:
    """`wte + wpe`: the stream of a transformer starts low; a sum that is looked at in FP32 keeps its digits."""
    text = f"{KNOWN}\ny = add.Tensor(r, s)\n{readers}"
    plan = planned(program(text, "o"))
    assert plan.values["y"].origin == expected


@pytest.mark.parametrize(
    ("readers", "expected"),
    [
        ("o = gelu.default(y)", "rounded"),
        ("o = layer_norm.default(y)", "rounded"),
        ("t = add.Tensor(y, h)\no = gelu.default(t)", "rounded"),
        ("o = sub.Tensor(x, y)", "full"),
        ("v = view.default(y)\no = sub.Tensor(x, v)", "full"),
        ("o = mse_loss.default(y, x)", "full"),
    ],
)
@pytest.mark.parametrize("other", ["w", "r"])
def test_a_weight_joins_rounded_values_where_nobody_looks_at_the_sum(readers: str, expected: str, other: str) -> None:
    """A base of 500 beside changes of 1: autocast returns the sum in FP32, and so do losses read it."""
    plan = planned(program(f"{KNOWN}\ny = add.Tensor(h, {other})\n{readers}", "o"))
    assert plan.values["y"].origin == expected
    assert planned(program(f"{KNOWN}\ny = add.Tensor(h, {other})", "y")).values["y"].origin == "full"


def test_a_sum_of_rows_that_is_returned_is_full() -> None:
    assert planned(program(f"{KNOWN}\ny = add.Tensor(r, s)", "y")).values["y"].origin == "full"


@pytest.mark.parametrize(("known", "expected"), [((-1.0, 1.0), "rounded"), ((0.0, 700.0), "full"), (None, "full")])
def test_a_table_of_known_range_joins_the_stream(known: tuple[float, float] | None, expected: str) -> None:
    """A sinusoid of positions; not the pixels of a grid."""
    ranges = {"b": known} if known else {}
    assert origin(f"{KNOWN}\ny = add.Tensor(r, b)\no = layer_norm.default(y)", **ranges) == expected
    assert origin(f"{KNOWN}\ny = add.Tensor(h, b)\no = layer_norm.default(y)", **ranges) == expected


def test_a_mask_made_by_the_program_is_added_to_scores() -> None:
    """Never positive, in front of a softmax: what rounding takes from it, the softmax forgets. Not so a bias of any sign."""
    made = "f = to.dtype(m) {'dtype': 'fp32'}\ng = rsub.Scalar(f) {'other': 1.0}\nn = mul.Tensor(g) {'other': -1e4}"
    assert origin(f"{KNOWN}\n{made}\ny = add.Tensor(h, n)\no = softmax.int(y) {{'dim': -1}}") == "rounded"
    assert origin(f"{KNOWN}\n{made}\ny = add.Tensor(h, n)\no = gelu.default(y)") == "full"
    assert origin(f"{KNOWN}\ny = add.Tensor(h, x)\no = softmax.int(y) {{'dim': -1}}") == "full"


@pytest.mark.parametrize(
    "norm",
    [
        "u = mean.dim(a) {'dim': -1}\nd = sub.Tensor(a, u)\nv = std.dim(a) {'dim': -1}\ny = div.Tensor(d, v)",
        "q = pow.Tensor_Scalar(a) {'exponent': 2}\nu = mean.dim(q)\nt = add.Tensor(u) {'other': 1e-5}\n"
        "v = rsqrt.default(t)\ny = mul.Tensor(a, v)",
        "u = mean.dim(a)\nd = sub.Tensor(a, u)\nq = mul.Tensor(d, d)\nv = mean.dim(q)\nt = add.Tensor(v) {'other': 1e-5}\n"
        "s2 = sqrt.default(t)\ny = div.Tensor(d, s2)",
        "n = linalg_vector_norm.default(a)\nt = clamp_min.default(n) {'min': 1e-12}\nv = expand.default(t)\ny = div.Tensor(a, v)",
        "q = exp.default(a)\nt = sum.dim_IntList(q)\ny = div.Tensor(q, t)",
    ],
)
@pytest.mark.parametrize("given", ["x", "h"])
def test_a_norm_by_hand_is_a_norm(norm: str, given: str) -> None:
    """Its arithmetic is FP32 where it reads what is full; its result may be given low."""
    plan = planned(program(f"{KNOWN}\na = view.default({given})\n{norm}\n{ROUNDED}", "o"))
    assert plan.values["y"].origin == "rounded"
    if given == "x":
        assert plan.nodes["y"].precision == "fp32"


def test_a_value_times_its_own_mean_is_no_norm() -> None:
    assert origin(f"{KNOWN}\nu = mean.dim(h)\ny = mul.Tensor(h, u)\n{ROUNDED}") == "full"


def test_rows_are_looked_up_in_the_master() -> None:
    """Or the gradients of a row that is looked up 20,000 times would add up in the low type."""
    plan = planned(program("y = index.Tensor(w, i)\no = linear.default(y, w1)", "o"))
    assert (plan.nodes["y"].precision, plan.values["y"].dtype) == ("fp32", "fp32")
    assert "gradients" in plan.nodes["y"].reason
    assert plan.nodes["o"].precision == "bf16"


def test_what_only_moves_goes_low_with_those_who_round_it() -> None:
    text = "v = view.default(x)\nt = transpose.int(v)\no = linear.default(t, w)"
    plan = planned(program(text, "o"))
    assert {plan.nodes[name].precision for name in ("v", "t", "o")} == {"bf16"}
    plan = planned(program(f"{text}\nq = exp.default(v)", "o"))
    assert plan.nodes["v"].precision == "fp32"
    # Returned in FP32 too; where the caller asks for low results, returning rounds.
    both = program("v = view.default(x)\no = linear.default(v, w)", "v")
    both.outputs.append("o")
    assert planned(both).nodes["v"].precision == "fp32"
    assert planned(both, output="low").nodes["v"].precision == "bf16"


def test_a_product_that_stays_fp32_takes_its_views_with_it() -> None:
    """Its side of the cut is theirs: a view of an input stored low would round what nobody rounds."""
    graph = program("v = view.default(x)\no = linear.default(v, w)\nr = linear.default(v, w1)", "o")
    graph.outputs.append("r")
    for node in graph:
        node.flops = 1 if node.id == "o" else 1 << 40 if node.id == "r" else 0
    plan = run(graph, fx_passes(Policy("bf16"), "cpu"), verify_each)[0]
    assert (plan.nodes["o"].precision, plan.nodes["r"].precision, plan.nodes["v"].precision) == ("fp32", "bf16", "fp32")


def test_a_state_is_full_from_its_start_on() -> None:
    text = "s1 = linear.default(x, w)\nt1 = mul.Tensor(s1) {'other': 0.01}\na1 = add.Tensor(x, t1)\n"
    text += "s2 = linear.default(a1, w)\nt2 = mul.Tensor(s2) {'other': 0.01}\na2 = add.Tensor(a1, t2)"
    plan = planned(program(text, "a2"))
    assert [plan.nodes[name].precision for name in ("s1", "t1", "a1", "s2", "t2", "a2")] == ["bf16", "bf16", "fp32"] * 2
    assert plan.nodes["a1"].reason == "FP32, because the graph's input x reaches it"
    assert plan.nodes["a2"].reason == "FP32, because the graph's input x reaches it through a1"


def test_a_group_is_full_if_one_of_it_is() -> None:
    graph = program("h = linear.default(x, w)\na = relu.default(h)\nc = add.Tensor(x, h)\no = gelu.default(a)", "o")
    graph.outputs.append("c")
    graph.nodes["a"].group = graph.nodes["c"].group = "carry"
    plan = planned(graph)
    assert {plan.values[name].origin for name in ("a", "c")} == {"full"}
    assert plan.nodes["o"].precision == "fp32"


def test_the_caller_s_word_is_stronger() -> None:
    graph = program("y = relu.default(x)\no = exp.default(y)", "o")
    passes = fx_passes(Policy("bf16"), "free-low", force_low=("y",))
    plan = run(graph, passes, verify_each)[0]
    assert (plan.nodes["y"].precision, plan.values["y"].origin) == ("bf16", "rounded")
    assert plan.nodes["y"].reason == "low='y'"


def test_a_product_that_the_caller_keeps_is_full() -> None:
    graph = program("h = linear.default(x, w)\ny = relu.default(h)\no = linear.default(y, w1)", "o")
    passes = fx_passes(Policy("bf16"), "free-low", keep_fp32=("h",))
    plan = run(graph, passes, verify_each)[0]
    assert (plan.values["h"].origin, plan.nodes["y"].precision) == ("full", "fp32")


@pytest.mark.parametrize("low", ["bf16", "fp16"])
def test_torch_s_own_plan_knows_no_origins(low: str) -> None:
    plan = planned(program("y = relu.default(x)\no = linear.default(y, w)", "o"), low, plan="autocast")
    assert {value.origin for value in plan.values.values()} == {""}


@pytest.mark.parametrize("broken", ["stored", "read", "moved"])
def test_the_verifier_holds_the_law(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = program(
        "h = linear.default(x, w)\nv = view.default(x)\ny = relu.default(v)\nq = argmax.default(y)\no = linear.default(y, w)",
        "o",
    )
    plan = planned(graph)
    laws.verify(plan)
    assert not list(laws.full_values(plan))
    node = {"stored": "y", "read": "y", "moved": "v"}[broken]
    plan.nodes[node].precision = "bf16"
    plan.values[node].dtype = "bf16"
    if broken == "read":
        plan.nodes[node].results = {0: "fp32"}
        plan.values[node].dtype = "fp32"
        plan.values[plan.nodes[node].inputs[0]].dtype = "bf16"
    found = [breach.code for breach in laws.full_values(plan)] if broken != "moved" else _moved(plan)
    assert "MP409" in found
    monkeypatch.setitem(laws.STAGES, "cast", (laws.full_values,))
    with pytest.raises(LawError, match="MP409"):
        laws.verify(plan, stage="cast")


def _moved(plan: PrecisionGraph) -> list[str]:
    from mpcompile.passes.insert_casts import InsertCasts

    InsertCasts("bf16").apply(plan)
    return [breach.code for breach in laws.full_values(plan)]
