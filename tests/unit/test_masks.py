"""Constant attention masks are folded; a mask that the data decides, or that says something else, stays."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mpcompile import mpcompile
from mpcompile.aten.functional import make_explicit
from mpcompile.aten.rewrites.masks import ATTENTION, fold_masks, kind_of

SIZE = 6
Mask = Callable[[Tensor], Tensor | None]


def positions() -> tuple[Tensor, Tensor]:
    return torch.arange(SIZE)[:, None], torch.arange(SIZE)[None, :]


def causal(x: Tensor) -> Tensor:
    rows, columns = positions()
    return (columns <= rows).expand(x.shape[0], 1, SIZE, SIZE)


def packed(x: Tensor) -> Tensor:
    """What transformers writes: causal, and within one sequence of those that the positions tell apart."""
    batch, (rows, columns) = torch.arange(x.shape[0])[:, None, None, None], positions()
    places = torch.arange(SIZE)[None].expand(x.shape[0], -1)
    starts = (torch.diff(places, prepend=places[:, :1] - 1, dim=-1) != 1).cumsum(-1)
    return (columns <= rows) & (starts[batch, rows] == starts[batch, columns])


def through(x: Tensor) -> Tensor:
    return (torch.arange(SIZE)[None, None, :, None] >= 0).expand(x.shape[0], 1, SIZE, SIZE)


def added(x: Tensor) -> Tensor:
    return torch.full((SIZE, SIZE), float("-inf")).triu(1)


def lowest(x: Tensor) -> Tensor:
    return torch.where(causal(x), 0.0, torch.finfo(torch.float32).min)


def of_ones(x: Tensor) -> Tensor:
    return x.new_ones(SIZE, SIZE).tril().bool()


def in_place(x: Tensor) -> Tensor:
    return torch.zeros(SIZE, SIZE).masked_fill_(~causal(x)[0, 0], float("-inf"))


def of_data(x: Tensor) -> Tensor:
    return x[:, None, :, :1].expand(-1, 1, SIZE, SIZE) < 100


def window(x: Tensor) -> Tensor:
    rows, columns = positions()
    return (columns <= rows) & (columns > rows - 3)


def random(x: Tensor) -> Tensor:
    return torch.rand(SIZE, SIZE).tril() >= 0


def bias(x: Tensor) -> Tensor:
    rows, columns = positions()
    return -(rows - columns).abs() * 0.1


def written_later(x: Tensor) -> Tensor:
    mask = torch.ones(SIZE, SIZE, dtype=torch.bool)
    mask[:, 0] = x[0, 0, 0] < 100
    return mask


class Attention(nn.Module):
    def __init__(self, mask: Mask, extra_keys: int = 0) -> None:
        super().__init__()
        self.inner, self.mask, self.extra = nn.Linear(8, 24), mask, extra_keys

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.inner(x).view(x.shape[0], SIZE, 3, 2, 4).permute(2, 0, 3, 1, 4)
        if self.extra:
            k, v = (torch.cat([t[:, :, : self.extra], t], 2) for t in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask(x))


def folded(model: nn.Module) -> tuple[dict[str, int], list[object]]:
    program = torch.export.export(model, (torch.randn(2, SIZE, 8),), strict=False)
    make_explicit(program.graph_module)
    done = fold_masks(program.graph_module)
    program.graph_module.graph.lint()
    (attention,) = program.graph_module.graph.find_nodes(op="call_function", target=ATTENTION)
    return done, [attention.args[3] if len(attention.args) > 3 else attention.kwargs.get("attn_mask"), attention]


@pytest.mark.parametrize("mask", [causal, packed, added, lowest, of_ones, in_place])
def test_a_causal_mask_becomes_is_causal(mask: Mask) -> None:
    done, (left, attention) = folded(Attention(mask))
    assert (done, left) == ({"causal": 1}, None)
    assert attention.args[5] is True
    # Nothing is computed for it any more.
    assert not [n for n in attention.graph.nodes if "arange" in str(n.target) or "tril" in str(n.target)]


def test_a_mask_that_lets_everything_through_is_dropped() -> None:
    done, (left, attention) = folded(Attention(through))
    assert (done, left, attention.args[5]) == ({"all": 1}, None, False)


@pytest.mark.parametrize("mask", [of_data, window, random, bias, written_later])
def test_any_other_mask_stays(mask: Mask) -> None:
    done, (left, _) = folded(Attention(mask))
    assert done == {}
    assert left is not None


def test_a_causal_mask_over_more_keys_than_queries_stays() -> None:
    """`is_causal` starts at the first key, which says something else there."""
    mask = torch.ones(SIZE, SIZE + 2, dtype=torch.bool).tril(2)
    assert kind_of(mask, 0) == ""
    done, _ = folded(Attention(lambda x: torch.ones(SIZE, SIZE + 2, dtype=torch.bool).tril(2), extra_keys=2))
    assert done == {}


@pytest.mark.parametrize("mask", [causal, packed, through, lowest, of_ones, window, of_data])
def test_the_numbers_stay(mask: Mask) -> None:
    torch.manual_seed(0)
    model, x = Attention(mask), torch.randn(3, SIZE, 8)
    expected = model(x)
    (wanted,) = torch.autograd.grad(expected.square().sum(), model.inner.weight)
    got = mpcompile(model, "fp32", backend="eager")(x)
    (grad,) = torch.autograd.grad(got.square().sum(), model.inner.weight)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad, wanted, rtol=1e-5, atol=1e-5)


def test_a_mask_that_gives_the_result_more_rows_stays() -> None:
    class Wider(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            mask = torch.ones(3, 1, SIZE, SIZE, dtype=torch.bool)
            return F.scaled_dot_product_attention(x[None, :1], x[None, :1], x[None, :1], attn_mask=mask)

    done, (left, attention) = folded(Wider())
    assert attention.meta["val"].shape == (3, 1, SIZE, 8)
    assert done == {}
    assert left is not None


def test_an_attention_with_dropout_keeps_it() -> None:
    class Dropping(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, x, x, attn_mask=through(x)[:, 0], dropout_p=0.25, scale=0.5)

    _, (_, attention) = folded(Dropping())
    assert attention.args[3:] == (None, 0.25, False)
    assert attention.kwargs == {"scale": 0.5}


def test_a_constant_mask_is_folded_where_the_number_of_queries_is_not_fixed() -> None:
    """Reading the sizes failed: a symbolic one has no hash."""

    class Through(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, x, x, attn_mask=torch.ones(1, 1, dtype=torch.bool))

    sizes = ({2: torch.export.Dim("sequence")},)
    program = torch.export.export(Through(), (torch.randn(2, 3, SIZE, 8),), dynamic_shapes=sizes, strict=False)
    assert fold_masks(program.graph_module) == {"all": 1}
    (attention,) = program.graph_module.graph.find_nodes(op="call_function", target=ATTENTION)
    assert isinstance(attention.meta["val"].shape[2], torch.SymInt)


@pytest.mark.parametrize("mask", [of_ones, added])
def test_masks_are_computed_on_the_cpu_whatever_the_default_device(mask: Mask) -> None:
    program = torch.export.export(Attention(mask), (torch.randn(2, SIZE, 8),), strict=False)
    make_explicit(program.graph_module)
    with torch.device("meta"):
        assert fold_masks(program.graph_module) == {"causal": 1}
