"""FP8 copies and products on a CPU, where they are defined: against FP64, at the ends of the formats, through NaN."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mpcompile import fp8
from mpcompile.formats import FORMAT
from mpcompile.runtime.fp8_linear import copies_of, multiply
from mpcompile.runtime.quantise import FLOOR, look, quantise, scaled_product

FORMS = ("float8_e4m3fn", "float8_e5m2")


def matrix(rows: int = 48, columns: int = 80, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.mark.parametrize("rowwise", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_a_copy_times_its_scale_is_the_matrix_to_half_a_unit(form: str, rowwise: bool) -> None:
    x = matrix()
    lies, scale, turned, turned_scale = quantise(x, form, True, True, rowwise)
    assert lies.shape == (48, 80)
    assert turned.shape == (80, 48)
    assert scale.shape == ((48, 1) if rowwise else (1, 1))
    for copy, its, wanted in ((lies, scale, x), (turned, turned_scale, x.t())):
        assert copy.dtype == getattr(torch, form)
        assert copy.is_contiguous()
        back, exact = copy.double() * its.double(), wanted.double()
        half = 2.0 ** -FORMAT[form].significand
        # Half a unit of the element, or of the smallest normal number where it is below.
        least = FORMAT[form].smallest_normal * its.double()
        assert ((back - exact).abs() <= half * torch.maximum(exact.abs(), least) * (1 + 1e-6)).all()


@pytest.mark.parametrize("form", FORMS)
def test_the_largest_element_is_the_format_s_largest_and_nothing_overflows(form: str) -> None:
    x = matrix() * 1e30
    lies, scale, *_ = quantise(x, form, True, False)
    assert lies.float().abs().max() == FORMAT[form].largest
    assert scale.item() == pytest.approx(x.float().abs().max().item() / FORMAT[form].largest)


@pytest.mark.parametrize("form", FORMS)
def test_elements_far_below_the_largest_round_to_zero_and_are_counted_so(form: str) -> None:
    x = torch.full((16, 16), 1.0)
    least = FORMAT[form].smallest / FORMAT[form].largest
    x[0, :] = least * 0.49
    x[1, :] = least * 0.51
    lies, *_ = quantise(x, form, True, False)
    assert (lies.float() == 0).sum() == 16
    assert (lies[0].float() == 0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("rowwise", [False, True])
def test_nan_and_infinity_reach_all_that_shares_the_scale(bad: float, rowwise: bool) -> None:
    x, w = matrix(16, 32), matrix(16, 32, 1)
    x[3, 4] = bad
    a, b = quantise(x, FORMS[0], True, True, rowwise), quantise(w, FORMS[0], True, True, rowwise)
    result = scaled_product(a[0], b[0], a[1], b[1])
    spoilt = torch.isnan(result).all(1)
    assert spoilt[3]
    assert spoilt.sum() == (1 if rowwise else 16)
    turned = scaled_product(b[2].t().contiguous(), b[2].t().contiguous(), b[1], b[1])
    assert torch.isfinite(turned).all()


@pytest.mark.parametrize("form", FORMS)
def test_zeros_and_the_smallest_numbers_have_a_finite_scale(form: str) -> None:
    for x in (torch.zeros(16, 16), torch.full((16, 16), 1e-40), torch.full((16, 16), FLOOR)):
        lies, scale, *_ = quantise(x, form, True, False)
        assert torch.isfinite(scale).all()
        assert torch.isfinite(lies.float()).all()
    assert (quantise(torch.zeros(16, 16), form, True, False)[0].float() == 0).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bad", [None, float("nan"), float("-inf")])
def test_a_largest_magnitude_that_is_known_gives_the_same_copies(form: str, bad: float | None) -> None:
    x = matrix()
    if bad is not None:
        x[3, 4] = bad
    largest = look(x)
    assert largest is not None
    assert largest.dtype == torch.float32
    for got, want in zip(quantise(x, form, True, True, False, largest), quantise(x, form, True, True), strict=True):
        assert torch.equal(got.float(), want.float()) or (torch.isnan(want.float()) == torch.isnan(got.float())).all()
    assert look(x[:0]) is None


@pytest.mark.parametrize("form", FORMS)
def test_half_a_unit_beyond_the_largest_magnitude_is_still_in_the_format(form: str) -> None:
    """A compiler that fuses `look` with what made the matrix sees it before it is rounded to BF16."""
    x = matrix()
    largest = look(x)
    assert largest is not None
    lies, *_ = quantise(x, form, True, False, False, largest * (1 - 2.0**-8))
    assert lies.float().abs().max() == FORMAT[form].largest
    # Without the bound that the definition has, too: kernels rely on it.
    beyond = torch.tensor(FORMAT[form].largest * (1 + 2.0**-7))
    assert beyond.to(getattr(torch, form)).float() == FORMAT[form].largest


def test_copies_that_are_not_wanted_have_no_elements() -> None:
    lies, scale, turned, turned_scale = quantise(matrix(), FORMS[0], False, True)
    assert lies.numel() == scale.numel() == 0
    assert turned.shape == (80, 48)
    assert turned_scale.shape == (1, 1)
    assert quantise(matrix()[:0], FORMS[0], True, True)[0].shape == (0, 80)


def test_fakes_have_the_shapes_of_what_is_computed() -> None:
    # The check of schemas multiplies results, which FP8 tensors cannot be.
    fakes = ("test_faketensor",)
    for rowwise in (False, True):
        given = (matrix(), FORMS[0], True, True, rowwise)
        torch.library.opcheck(torch.ops.mpcompile.quantise.default, given, test_utils=fakes)
    torch.library.opcheck(torch.ops.mpcompile.quantise.default, (*given[:4], False, torch.ones(1)), test_utils=fakes)
    a = quantise(matrix(), FORMS[0], True, False)
    given = (a[0], a[0], a[1], a[1], torch.ones(48))
    torch.library.opcheck(torch.ops.mpcompile.scaled_product.default, given, test_utils=fakes)


@pytest.mark.parametrize("recipe", fp8.RECIPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("passes", [(), ("output",), ("grad_input",), ("grad_weight",), fp8.PASSES])
def test_each_pass_of_a_linear_layer_is_in_fp8_or_bf16_as_it_is_told(
    passes: tuple[str, ...], bias: bool, recipe: str
) -> None:
    x, w = matrix(64, 96).reshape(4, 16, 96).requires_grad_(), matrix(48, 96, 1).requires_grad_()
    b = matrix(1, 48, 2).reshape(48).requires_grad_() if bias else None
    leaves = [x, w, b] if b is not None else [x, w]
    y = multiply(x, w, b, copies_of(x, True, True, recipe), copies_of(w, True, True, recipe), passes, recipe)
    grad = matrix(64, 48, 3).reshape(4, 16, 48)
    exact = torch.nn.functional.linear(*(leaf.double() for leaf in leaves))
    found = [y, *torch.autograd.grad(y, leaves, grad)]
    wanted = [exact, *torch.autograd.grad(exact, leaves, grad.double())]
    assert y.dtype == torch.bfloat16
    for step, got, right in zip((*fp8.PASSES, "bias"), found, wanted, strict=False):
        off = ((got.double() - right).norm() / right.norm()).item()
        # Two operands of 3 bits (gradients of 2) against two of 8; every product has the size of its operands' rounding.
        assert (0.02 < off < 0.09) if step in passes else off < 0.006, (step, off)


@pytest.mark.parametrize("passes", [("grad_weight",), fp8.PASSES])
def test_the_backward_keeps_an_input_in_fp8_alone(passes: tuple[str, ...]) -> None:
    x, w = matrix(64, 96).requires_grad_(), matrix(48, 96, 1).requires_grad_()
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        multiply(
            x,
            w,
            None,
            copies_of(x, True, True, "tensorwise"),
            copies_of(w, True, True, "tensorwise"),
            passes,
            "tensorwise",
        )
    size = sum(t.nbytes for t in kept)
    assert size == 64 * 96 + 4 + ((48 * 96 + 4) if "grad_input" in passes else 48 * 96 * 2)


def test_nothing_is_transposed_where_nothing_is_trained() -> None:
    with torch.no_grad():
        assert copies_of(matrix(), True, True, "tensorwise")[2].numel() == 0
