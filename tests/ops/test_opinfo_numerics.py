"""Every op of torch's OpInfo database, forward and backward, run as low as its rule allows, against FP32.

The samples are rounded to the low type first, so that both sides read the same numbers: what differs is what the op
itself loses.  Each error is measured against the largest number of its tensor.
"""

from __future__ import annotations

import itertools
import math
import random
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from opsweep import database, flat_call, samples, trace
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, PendingUnbackedSymbolNotFound
from torch.utils import _pytree as pytree

from mpcompile.aten.read import read
from mpcompile.aten.write import write
from mpcompile.formats import LOW
from mpcompile.graph import PrecisionGraph
from mpcompile.hardware import emulated_kinds
from mpcompile.passes.assign import Assign
from mpcompile.passes.base import PassResult
from mpcompile.passes.classify import Classify
from mpcompile.passes.hazards import Hazards
from mpcompile.passes.insert_casts import InsertCasts
from mpcompile.passes.normalize import Normalize
from mpcompile.passes.simplify_casts import SimplifyCasts
from mpcompile.pipeline import Verify, run

TORCH = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Roundings that an op and its backward may add up, in units of the low type's own.
ROUNDINGS = {"forward": 4.0, "backward": 12.0}
EPSILON = {"bf16": 2.0**-8, "fp16": 2.0**-11}
# OpInfos whose numbers are drawn, or not written: their types and shapes alone are compared.
DRAWN = frozenset(
    ("bernoulli", "cauchy", "exponential", "geometric", "log_normal", "multinomial", "normal", "rand_like", "randint",
     "randint_like", "randn", "randn_like", "uniform", "nn.functional.rrelu", "nn.functional.alpha_dropout",
     "nn.functional.dropout", "nn.functional.dropout2d", "nn.functional.dropout3d",
     "nn.functional.feature_alpha_dropout", "nn.functional.fractional_max_pool2d",
     "nn.functional.fractional_max_pool3d", "nn.functional.multi_head_attention_forward", "pca_lowrank", "svd_lowrank",
     "empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided")
)  # fmt: skip
# OpInfos that are left out, and why.
SKIPPED = {
    **dict.fromkeys(("jiterator_2inputs_2outputs", "jiterator_4inputs_with_extra_args", "jiterator_binary",
                     "jiterator_binary_return_by_ref", "jiterator_unary"), "CUDA only"),
    "linalg.eig": "its backward refuses a sum over eigenvectors",
    "chalf": "torch has no arithmetic on its output",
    **dict.fromkeys(("signal.windows.nuttall", "signal.windows.blackman"), "cancel to nothing at their ends"),
    "linalg.pinv singular": "a rank that rounding changes",
    "as_strided": "reads past its argument, into storage that a clone does not have",
    "nn.functional.normalize": "along one element its gradient is rounding alone",
    **dict.fromkeys(("sparse.sampled_addmm", "to_sparse", "sparse.mm"), "torch does not trace sparse tensors"),
}  # fmt: skip
# Left out where operands are mixed by lot, and why.
NOT_MIXED = {
    "nn.functional.multilabel_soft_margin_loss": "a difference of products, of which one alone is told to round",
    **dict.fromkeys(("tan", "special.erfcx"), "a slope beyond FP16's range, at an operand that is told to be low"),
}
# A trace with fake tensors cannot know what these depend on.
UNTRACEABLE = (DataDependentOutputException, DynamicOutputShapeException, GuardOnDataDependentSymNode,
               PendingUnbackedSymbolNotFound)  # fmt: skip


@dataclass(frozen=True)
class Lowest:
    """Everything that may be low is low: what a plan would do for the best of its neighbours."""

    name: ClassVar[str] = "lowest"
    ensures: ClassVar[str] = "structure"

    def apply(self, graph: PrecisionGraph) -> PassResult:
        free = [node for node in graph if node.verdict != "fp32" and node.kind != "cast"]
        for node in free:
            node.verdict, node.decided_by = "low", "override"
        return PassResult(bool(free))


@dataclass(frozen=True)
class Mixed:
    """Every operand and operation that may be low is low or FP32, by lot: an op between neighbours of both kinds."""

    seed: int

    name: ClassVar[str] = "mixed"
    ensures: ClassVar[str] = "structure"

    def apply(self, graph: PrecisionGraph) -> PassResult:
        draw = random.Random(self.seed)
        free = [node for node in graph if node.verdict != "fp32" and node.kind != "cast"]
        for node in free:
            node.verdict, node.decided_by = draw.choice(("low", "fp32")), "override"
        return PassResult(bool(free))


def lowered(
    call: Callable[..., Any], tensors: list[Tensor], low: str, choose: Lowest | Mixed | None = None
) -> tuple[Callable[..., Any], list[str]]:
    """The call rewritten, and the ops of it that run low."""
    capture = read(trace(call, tensors))
    passes = [Normalize(), Classify(low), Hazards(low), choose or Lowest(), Assign(low, fused=False), InsertCasts(low),
              SimplifyCasts(), Verify(low)]  # fmt: skip
    graph, _ = run(capture.graph, passes)
    module = write(capture, graph, emulate=emulated_kinds("cpu", low, compiled=False)).module
    return module, [node.op for node in graph if node.precision in LOW and not node.is_cast]


def rounded(tensor: Tensor, low: str) -> Tensor:
    """The nearest numbers that the low type holds, in FP32."""
    found = tensor.detach()
    if found.dtype == torch.float32 and found.layout == torch.strided:
        found = found.to(TORCH[low]).float()
    return found.requires_grad_(tensor.requires_grad)


def outcome(call: Callable[..., Any], tensors: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The call's tensors, and the gradients of a fixed weighted sum of those that have one."""
    leaves = [t.detach().clone().requires_grad_(t.requires_grad) for t in tensors]
    torch.manual_seed(1)
    # A clone: an op may write into its argument, which a leaf refuses.
    results = [r for r in pytree.tree_leaves(call(*[t.clone() for t in leaves])) if isinstance(r, Tensor)]
    grown = [r for r in results if r.requires_grad]
    if not grown:
        return results, []
    torch.manual_seed(2)
    weights = [torch.rand(r.shape, dtype=torch.float32).to(r.dtype) for r in grown]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    grads = torch.autograd.grad(grown, wanted, weights, allow_unused=True)
    return results, [g for g in grads if g is not None]


def far(got: Tensor, wanted: Tensor, allowed: float, stage: str) -> str:
    """What is wrong with a tensor, or ""; `allowed` is relative to the largest number, infinite for no matter."""
    got, wanted = got.detach(), wanted.detach()
    if got.layout != torch.strided:
        got, wanted = got.to_dense(), wanted.to_dense()
    if got.dtype != wanted.dtype or got.shape != wanted.shape:
        return f"{stage}: {got.dtype}{list(got.shape)} instead of {wanted.dtype}{list(wanted.shape)}"
    if math.isinf(allowed):
        return ""
    if not wanted.is_floating_point() or not wanted.numel():
        return "" if torch.equal(got, wanted) else f"{stage}: other integers"
    finite = wanted.isfinite()
    if not torch.equal(got.isfinite(), finite):
        return f"{stage}: other infinities"
    # A gradient that cancels to nothing is as wrong as the numbers that it is the difference of.
    scale = max({"forward": 1e-3, "backward": 0.1}[stage], float(wanted[finite].abs().max())) if finite.any() else 1.0
    error = float((got[finite] - wanted[finite]).abs().max()) / scale if finite.any() else 0.0
    return "" if error <= allowed else f"{stage}: off by {error:.2g} of the largest"


def apart(call: Callable[..., Any]) -> Callable[..., Any]:
    """The call with a node in front of each float operand, which has a precision of its own."""
    return lambda *given: call(*[t.clone() if t.dtype == torch.float32 else t for t in given])


def compare(info: Any, sample: Any, low: str, seed: int | None = None) -> tuple[list[str], str]:
    """The ops that ran low for one sample, and what is wrong with the outcome; with a `seed`, by lot (`Mixed`)."""
    call, tensors = flat_call(info, sample)
    tensors = [rounded(t, low) for t in tensors]
    module, ops = lowered(call, tensors, low) if seed is None else lowered(apart(call), tensors, low, Mixed(seed))
    wanted, wanted_grads = outcome(call, tensors)
    got, got_grads = outcome(module, tensors)
    if (len(got), len(got_grads)) != (len(wanted), len(wanted_grads)):
        return ops, f"{len(got)} results and {len(got_grads)} gradients, not {len(wanted)} and {len(wanted_grads)}"
    # An op may add a rounding of its own to those that its operands bring.
    drawn = math.inf if info.name in DRAWN else 0.0
    allowed = {stage: (count + len(ops)) * EPSILON[low] + drawn for stage, count in ROUNDINGS.items()}
    pairs = [(g, w, "forward") for g, w in zip(got, wanted, strict=True)]
    pairs += [(g, w, "backward") for g, w in zip(got_grads, wanted_grads, strict=True)]
    return ops, next((wrong for g, w, stage in pairs if (wrong := far(g, w, allowed[stage], stage))), "")


def nothing_to_compare(info: Any, sample: Any) -> bool:
    """Random samples of ops that need not be; a bias without a weight, which no module of torch has; and statistics
    without a weight, which CPU kernels give in the type of the input.
    """
    if info.name == "native_layer_norm":
        return sample.args[1] is None
    options = sample.kwargs
    return bool(options.get("dropout_p")) or (options.get("bias") is not None and options.get("weight", 0) is None)


def _name(info: Any) -> str:
    return f"{info.name} {info.variant_test_name}".strip()


def sweep(
    low: str, most: int, stride: int = 1, first: int = 0, seeds: tuple[int | None, ...] = (None,)
) -> tuple[Counter[str], dict[str, str]]:
    """Ops that ran low, with how often, and OpInfo -> what is wrong with it."""
    ran: Counter[str] = Counter()
    wrong: dict[str, str] = {}
    infos = [
        i for i in database() if torch.float32 in i.supported_dtypes("cpu") and not SKIPPED.keys() & {i.name, _name(i)}
    ]
    for info in infos[first::stride]:
        given = samples(info, most, torch.float32, requires_grad=info.supports_autograd)
        for sample, seed in itertools.product(given, seeds):
            if nothing_to_compare(info, sample) or (seed is not None and info.name in NOT_MIXED):
                continue
            try:
                with warnings.catch_warnings():
                    # The database calls functions that torch itself has deprecated.
                    warnings.simplefilter("ignore")
                    ops, difference = compare(info, sample, low, seed)
            except UNTRACEABLE:
                continue
            except Exception as error:
                ops, difference = [], f"{type(error).__name__}: {error}"
            ran.update(ops)
            if difference:
                wrong.setdefault(_name(info), f"{difference} ({', '.join(ops)})")
    return ran, wrong


@pytest.mark.parametrize("low", ["bf16", "fp16"])
def test_a_ninth_of_the_opinfo_database_is_right_in_low_precision(low: str) -> None:
    ran, wrong = sweep(low, most=1, stride=9)
    assert len(ran) > 25, "too little ran low for the sweep to mean anything"
    assert wrong == {}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("low", ["bf16", "fp16"])
def test_the_opinfo_database_is_right_in_low_precision(low: str) -> None:
    ran, wrong = sweep(low, most=8)
    assert len(ran) > 290
    assert wrong == {}


@pytest.mark.parametrize(("low", "first"), [("bf16", 5), ("fp16", 13)])
def test_low_and_fp32_operands_mixed_are_right(low: str, first: int) -> None:
    ran, wrong = sweep(low, most=1, stride=25, first=first, seeds=(0, 1))
    assert len(ran) > 12, "too little ran low for the sweep to mean anything"
    assert wrong == {}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("low", ["bf16", "fp16"])
def test_low_and_fp32_operands_mixed_are_right_in_the_whole_database(low: str) -> None:
    ran, wrong = sweep(low, most=2, seeds=(0, 1, 2))
    assert len(ran) > 150
    assert wrong == {}


def test_a_wrong_number_is_seen() -> None:
    wanted = torch.tensor([1.0, 2.0, float("inf")])
    assert far(wanted, wanted, 0.0, "forward") == ""
    assert "off by 0.5" in far(torch.tensor([1.0, 1.0, float("inf")]), wanted, 0.1, "forward")
    assert "infinities" in far(torch.tensor([1.0, 2.0, 3.0]), wanted, 0.1, "forward")
    assert "bfloat16" in far(wanted.bfloat16(), wanted, 0.1, "forward")
    assert "integers" in far(torch.tensor([1]), torch.tensor([2]), 0.1, "forward")
