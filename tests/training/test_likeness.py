"""To whoever asks, a wrapper is its model: a host that took it for another thing would go another way in silence."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from mpcompile import mpcompile
from mpcompile.api import MixedPrecisionModule


class Base(nn.Module):
    """A library's base class: it makes methods of `nn.Module`, and special ones, its own."""

    def to(self, *args: Any, **kwargs: Any) -> Base:
        self.moved = True
        return super().to(*args, **kwargs)

    def __len__(self) -> int:
        return 0

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        return ((name, p) for name, p in super().named_parameters(*args, **kwargs) if name != "hidden")

    def __contains__(self, name: str) -> bool:
        return name in self._modules


class Net(Base):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.temperature = nn.Linear(16, 16), 1.0
        self.hidden = nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
        """Net's own words."""
        return self.inner(x) * scale / self.temperature


def wrap(model: nn.Module | None = None) -> Any:
    torch.manual_seed(0)
    return mpcompile(model or Net(), "bf16", backend="eager", low=["*"])


def test_a_wrapper_answers_as_its_model() -> None:
    mp = wrap()
    assert isinstance(mp, Net)
    assert isinstance(mp, Base)
    assert isinstance(mp, MixedPrecisionModule)
    assert not isinstance(mp, nn.Linear)
    assert issubclass(type(mp), MixedPrecisionModule)
    assert (mp._get_name(), mp.__class__, repr(mp)) == ("Net", Net, repr(mp.model))
    assert inspect.signature(mp.forward) == inspect.signature(mp.model.forward)
    assert inspect.signature(mp.__class__.forward) == inspect.signature(Net.forward)
    assert mp.forward.__doc__ == "Net's own words."


def test_the_methods_that_its_class_made_its_own_are_the_model_s() -> None:
    mp = wrap()
    assert mp.to(torch.float32) is mp
    assert mp.model.moved
    assert (len(mp), bool(mp), "inner" in mp, "hidden" in dict(mp.named_parameters())) == (0, False, True, False)
    layers = wrap(nn.Sequential(nn.Linear(16, 16), nn.ReLU()))
    assert [type(one) for one in layers] == [nn.Linear, nn.ReLU]
    assert (len(layers), layers[1]) == (2, layers.model[1])
    plain = wrap(nn.Linear(16, 16))
    assert bool(plain)
    with pytest.raises(TypeError):
        len(plain)


def test_models_of_one_class_share_a_class_of_wrappers_and_others_do_not() -> None:
    assert type(wrap()) is type(wrap())
    assert type(wrap()) is not type(wrap(nn.Linear(16, 16)))
    assert inspect.signature(wrap(nn.Linear(16, 16)).forward) == inspect.signature(nn.Linear(1, 1).forward)


def test_an_attribute_that_is_set_or_deleted_is_the_model_s() -> None:
    """It would be read by the model's own code, and saved: set on the wrapper alone it would change nothing."""
    mp, x = wrap(), torch.randn(4, 16)
    before = mp(x)
    mp.temperature = 2.0
    torch.testing.assert_close(mp(x), before / 2)
    mp.note = "new"
    assert mp.model.note == "new"
    del mp.note
    assert not hasattr(mp.model, "note")
    mp.inner = nn.Linear(16, 4)
    assert mp.model.inner.out_features == 4
    del mp.inner
    assert not hasattr(mp.model, "inner")


def test_a_forward_that_a_host_puts_around_ours_is_called() -> None:
    mp, x = wrap(), torch.randn(4, 16)
    original, calls = mp.forward, []

    def around(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(*args, **kwargs)

    mp.forward = around
    mp(x)
    assert calls == [1]
    assert "forward" not in vars(mp.model)
    del mp.forward
    mp(x)
    assert calls == [1]


def through_a_file(mp: Any) -> Any:
    file = io.BytesIO()
    torch.save(mp, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("way", [copy.deepcopy, copy.copy, lambda mp: pickle.loads(pickle.dumps(mp)), through_a_file])
def test_a_copy_is_a_wrapper_that_answers_as_its_model(way: Callable[[Any], Any]) -> None:
    mp, x = wrap(), torch.randn(4, 16)
    made = way(mp)
    assert isinstance(made, MixedPrecisionModule)
    assert isinstance(made, Net)
    assert type(made.model) is Net
    torch.testing.assert_close(made(x), mp(x), rtol=0, atol=0)


def test_torch_compile_around_it_and_around_a_parent_runs_it() -> None:
    mp, x = wrap(), torch.randn(4, 16)
    parent = nn.Sequential(mp, nn.ReLU())
    for compiled, plain in ((torch.compile(mp, backend="eager"), mp), (torch.compile(parent, backend="eager"), parent)):
        torch.testing.assert_close(compiled(x), plain(x), rtol=0, atol=0)
    products = [node.precision for plan in mp.plans for node in plan.graph if node.kind == "matmul"]
    assert set(products) == {"bf16"}


@pytest.mark.parametrize("change", [
    lambda m: parametrizations.weight_norm(m),
    lambda m: prune.l1_unstructured(m, "weight", 0.5),
    lambda m: m.register_forward_pre_hook(lambda _, given: (given[0] + 1.0,)),
], ids=["parametrized", "pruned", "hooked"])  # fmt: skip
def test_what_is_done_to_the_wrapper_is_seen_by_its_next_call(change: Callable[[Any], Any]) -> None:
    """The weight lies on the model itself, so these change the class, the tables or the hooks of what they are given."""
    torch.manual_seed(0)
    plain = nn.Linear(16, 16)
    mp, x = wrap(copy.deepcopy(plain)), torch.randn(4, 16)
    mp(x)
    change(mp)
    change(plain)
    torch.testing.assert_close(mp(x), plain(x), rtol=0.02, atol=0.02)


def test_a_parent_loads_what_its_child_s_class_translates() -> None:
    class Renamed(nn.Linear):
        def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
            state[prefix + "weight"] = state.pop(prefix + "old")
            super()._load_from_state_dict(state, prefix, *rest)

    mp = wrap(Renamed(16, 16, bias=False))
    parent, weight = nn.Sequential(mp), torch.randn(16, 16)
    parent.load_state_dict({"0.old": weight})
    torch.testing.assert_close(mp.model.weight, weight)
    with pytest.raises(KeyError):
        parent.load_state_dict({})
