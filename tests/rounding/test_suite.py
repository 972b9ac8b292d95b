"""The suite has what it promises, and sees what it should see."""

from __future__ import annotations

import pytest

from rounding.exceptions import EXCEPTIONS, unused
from rounding.measure import ROUNDING, WAYS, Distance, Run, autocast, distances, reference
from rounding.registry import ROWS
from rounding.suite import CASES, DOMAINS


def test_the_suite_is_what_it_should_be() -> None:
    assert len(CASES) > 400
    assert {case.row for case in CASES.values()} >= set(ROWS)
    assert {case.domain for case in CASES.values()} == {module.case.name for module in DOMAINS}
    assert unused([f"{name} {low} {way}" for name, c in CASES.items() for low in c.lows for way in WAYS]) == []
    assert all(one.roundings <= 64 and len(one.reason) > 30 for one in EXCEPTIONS)


def test_a_value_rounded_too_early_is_seen() -> None:
    """The suite's own eyes: a raw input that someone rounds is far outside the bound."""
    case = CASES["tabular/raw_norm[layer]"]
    model, (inputs, targets), loss = case.make()
    output = model(inputs[0].bfloat16().float())
    value = loss(output, *targets)
    value.backward()
    grads = {f"gradient {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    ours = Run({"loss": value.detach(), "output 0": output.detach(), **grads}, 1)
    found = distances(reference(case), autocast(case, "bf16"), ours)
    assert max(d.excess("bf16") for d in found) > 10


def test_what_is_not_finite_fails_only_where_autocast_is() -> None:
    assert Distance("loss", float("nan"), 0.1).excess("fp16") == float("inf")
    assert Distance("loss", 0.1, float("nan")).excess("fp16") == 0.0
    assert Distance("loss", ROUNDING["fp16"], 0.0).excess("fp16") == pytest.approx(0.5)
