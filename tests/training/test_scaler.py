"""The loss scale: equal to GradScaler where they overlap, one definition for numbers and tensors, all of it saved."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mpcompile.errors import TrainingError
from mpcompile.training.loss_scale.scale import LossScale, from_dict, inverse, tensors, to_dict, transition

steps = st.lists(st.booleans(), max_size=40)
inits = st.floats(2.0**-20, 2.0**127, width=32)
rules = st.builds(
    LossScale,
    kind=st.sampled_from(["dynamic", "static"]),
    init=st.floats(1.0, 2.0**20, width=32),
    growth=st.floats(1.25, 8.0),
    backoff=st.floats(0.125, 0.875),
    interval=st.integers(1, 4),
    floor=st.sampled_from([0.0, 0.5, 1.0]),
    cap=st.sampled_from([2.0**21, math.inf]),
    hysteresis=st.integers(1, 3),
    refill=st.sampled_from(["growth", "clean-step"]),
    at_floor=st.sampled_from(["keep", "warn", "raise"]),
)


def run(rule, state, outcomes):
    for finite in outcomes:
        state = transition(rule, state, finite)
    return state


@given(inits, st.floats(1.001, 4096.0), st.floats(2.0**-10, 0.999), st.integers(1, 3), steps)
def test_equals_torch_amp_update_scale(init, growth, backoff, interval, outcomes):
    rule = LossScale.dynamic(init, growth, backoff, interval, floor=0.0, cap=math.inf)
    state, on_device = rule.initial(), rule.initial("cpu")
    scale, tracker = torch.tensor(init), torch.tensor(0, dtype=torch.int32)
    for finite in outcomes:
        torch._amp_update_scale_(scale, tracker, torch.tensor(float(not finite)), growth, backoff, interval)
        state = transition(rule, state, finite)
        on_device = transition(rule, on_device, torch.tensor(finite))
        assert (state.scale, state.growth_tracker) == (scale.item(), tracker.item())
        assert torch.equal(on_device.scale, scale)
        assert on_device.growth_tracker.item() == tracker.item()


@given(rules, steps)
def test_numbers_and_tensors_agree_on_every_field(rule, outcomes):
    numbers = run(rule, rule.initial(), outcomes)
    on_device = run(rule, rule.initial("cpu"), [torch.tensor(finite) for finite in outcomes])
    assert [value.item() for value in on_device] == list(numbers)
    assert [value.dtype for value in on_device] == [torch.float32, *[torch.int32] * 2, *[torch.int64] * 3]


@given(rules, steps)
def test_scale_stays_between_floor_and_cap_and_every_step_is_counted(rule, outcomes):
    state = run(rule, rule.initial(), outcomes)
    assert state.steps == sum(outcomes)
    assert state.skipped == len(outcomes) - sum(outcomes)
    if rule.kind == "dynamic":
        assert rule.floor <= state.scale <= rule.cap
    else:
        assert state.scale == rule.initial().scale


@given(rules, steps, steps)
def test_saved_and_loaded_it_goes_on_as_if_never_stopped(rule, before, after):
    state = run(rule, rule.initial(), before)
    loaded_rule, loaded = from_dict(to_dict(rule, tensors(state, "cpu")), LossScale.dynamic())
    assert (loaded_rule, loaded) == (rule, state)
    assert run(loaded_rule, loaded, after) == run(rule, state, after)


@given(inits, steps)
def test_loads_what_a_grad_scaler_saved_and_the_reverse(init, outcomes):
    scaler = torch.amp.GradScaler("cpu", init_scale=init, growth_interval=2, growth_factor=3.0)
    scaler._lazy_init_scale_growth_tracker(torch.device("cpu"))
    for finite in outcomes:
        torch._amp_update_scale_(scaler._scale, scaler._growth_tracker, torch.tensor(float(not finite)), 3.0, 0.5, 2)
    rule, state = from_dict(scaler.state_dict(), LossScale.dynamic())
    assert state[:2] == (scaler.get_scale(), scaler._get_growth_tracker())
    twin = torch.amp.GradScaler("cpu")
    twin.load_state_dict({k: to_dict(rule, state)[k] for k in scaler.state_dict()})
    assert twin.state_dict() == scaler.state_dict()


def test_hysteresis_forgives_then_backs_off_and_refills_as_named():
    outcomes = [False, True, False, False]
    patient = LossScale.dynamic(1024.0, hysteresis=2, interval=100)
    assert [run(patient, patient.initial(), outcomes[:n]).scale for n in range(5)] == [1024, 1024, 1024, 512, 256]
    forgiving = LossScale.dynamic(1024.0, hysteresis=2, interval=100, refill="clean-step")
    assert [run(forgiving, forgiving.initial(), outcomes[:n]).scale for n in range(5)] == [1024] * 4 + [512]


def test_growth_past_fp32_is_not_taken_and_floor_hits_are_counted():
    top = LossScale.dynamic(2.0**127, interval=1, cap=math.inf)
    assert run(top, top.initial(), [True]).scale == 2.0**127
    low = LossScale.dynamic(2.0, floor=1.0)
    assert run(low, low.initial(), [False, False, False])[0::5] == (1.0, 2)


def test_inverse_is_rounded_once_from_fp64():
    scale = torch.tensor(3.0e5)
    assert inverse(scale).item() == scale.double().reciprocal().float().item() == inverse(3.0e5)


@pytest.mark.parametrize(
    "wrong",
    [
        {"init": 0.0},
        {"growth": 1.0},
        {"backoff": 1.0},
        {"interval": 0},
        {"hysteresis": 0},
        {"floor": 1e9},
        {"refill": "never"},
        {"at_floor": "cry"},
        {"init": math.inf},
    ],
)
def test_impossible_rules_are_refused(wrong):
    with pytest.raises(TrainingError, match="MP501"):
        LossScale.dynamic(**wrong)


def test_auto_scales_fp16_alone():
    assert LossScale.of("auto", "fp16") == LossScale.dynamic()
    assert LossScale.of("auto", "bf16").is_off
    assert LossScale.of(8, "fp16") == LossScale.static(8.0)
    with pytest.raises(TrainingError, match="MP501"):
        LossScale.of("dynamic", "fp16")
    with pytest.raises(TrainingError, match="lacks"):
        from_dict({}, LossScale.dynamic())
