"""The policy: a value with a one-line form."""

from __future__ import annotations

from dataclasses import fields
from typing import get_args, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpcompile.errors import RuleError
from mpcompile.policy import Policy

DEVICES = ("auto", "cpu", "h100", "free-low", "mine.toml", "/a b/c,d=e.toml#cpu", "Geräte.toml")
WORDS = {f.name: get_args(get_type_hints(Policy)[f.name]) or DEVICES for f in fields(Policy)}


def built(**words: str) -> Policy:
    """FP8 products are no policy of FP16 nor of torch.autocast's decisions."""
    if words["products"] == "fp8":
        words |= {"low": words["low"].replace("fp16", "bf16"), "plan": words["plan"].replace("autocast", "strict")}
    return Policy(**words)  # type: ignore[arg-type]


policies = st.builds(built, **{name: st.sampled_from(words) for name, words in WORDS.items()})


def quoted(word: str) -> str:
    return f'"{word}"' if " " in word or "," in word else word


@given(policies)
def test_one_line_round_trips(policy: Policy) -> None:
    assert Policy.parse(str(policy)) == policy
    assert "\n" not in str(policy)


@given(policies, st.randoms(use_true_random=False))
def test_order_and_spaces_do_not_matter(policy: Policy, random) -> None:
    parts = [f"{f.name}={quoted(getattr(policy, f.name))}" for f in fields(Policy)]
    random.shuffle(parts)
    assert Policy.parse(" , ".join(parts)) == policy


@given(st.dictionaries(st.sampled_from(sorted(WORDS)), st.integers(0, 2)))
def test_missing_fields_take_their_defaults(picks: dict[str, int]) -> None:
    given_fields = {name: WORDS[name][i % len(WORDS[name])] for name, i in picks.items()}
    if given_fields.get("products") == "fp8":
        given_fields = {"products": "fp8"}
    text = ",".join(f"{name}={quoted(word)}" for name, word in given_fields.items())
    if text:
        assert Policy.parse(text) == Policy(**given_fields)


def test_a_bare_word_is_the_low_type() -> None:
    assert Policy.parse("fp16") == Policy("fp16") == Policy.parse("low=fp16")
    assert Policy.parse("fp16,output=low") == Policy("fp16", output="low")
    assert Policy.parse(Policy("bf16")) == Policy("bf16")


def test_fp8_is_bf16_with_fp8_products() -> None:
    assert Policy.parse("fp8") == Policy("bf16", products="fp8")
    assert Policy.parse("fp8,fp8=rowwise,device=h100") == Policy("bf16", products="fp8", fp8="rowwise", device="h100")
    assert Policy.parse("products=fp8") == Policy("auto", products="fp8")
    assert str(Policy.parse("fp8")) == "low=bf16,plan=global,output=fp32,grads=fp32,products=fp8"


@pytest.mark.parametrize(
    "text", ["low=fp16,products=fp8", "fp8,fp16", "bf16,products=fp8,plan=autocast", "fp8,products=low"]
)
def test_fp8_products_are_bf16_s_and_a_plan_s_of_our_own(text: str) -> None:
    with pytest.raises(RuleError, match="MP201"):
        Policy.parse(text)


def test_the_default_prints_as_documented() -> None:
    assert str(Policy("fp16", grads="low")) == "low=fp16,plan=global,output=fp32,grads=low"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("bf61", "did you mean 'bf16'"),
        ("low=fp64", "low is one of auto, fp16, bf16, fp32"),
        ("plan=glbal", "did you mean 'global'"),
        ("ouput=low", "did you mean 'output'"),
        ("low=fp16,low=bf16", "gives low twice"),
        ("", "policy"),
        ("device=", "device is auto"),
        ('device="a.toml', "device is auto"),
    ],
)
def test_what_does_not_parse_says_what_would(text: str, says: str) -> None:
    with pytest.raises(RuleError, match="MP201") as caught:
        Policy.parse(text)
    assert says in str(caught.value)


@pytest.mark.parametrize(("name", "near"), [("h10", "h100"), ("cpu-amz", "cpu-amx"), ("freelow", "free-low")])
def test_a_device_without_a_row_is_refused_with_near_names(name: str, near: str) -> None:
    with pytest.raises(RuleError, match="MP206") as caught:
        Policy.parse(f"bf16,device={name}")
    assert f"did you mean {near!r}" in str(caught.value)


@given(st.text(min_size=1, max_size=20))
def test_any_file_name_round_trips_or_is_refused(stem: str) -> None:
    try:
        policy = Policy("bf16", device=f"{stem}.toml")
    except RuleError:
        return
    assert Policy.parse(str(policy)) == policy


def test_the_default_device_is_not_printed() -> None:
    assert "device" not in str(Policy("fp16", device="auto"))
    assert str(Policy("fp16", device="h100")).endswith(",device=h100")


@pytest.mark.parametrize("wrong", [16, None, ["fp16"]])
def test_other_types_are_refused(wrong: object) -> None:
    with pytest.raises(RuleError, match="MP201"):
        Policy.parse(wrong)  # type: ignore[arg-type]


@given(st.text(max_size=40))
def test_any_text_parses_or_is_refused(text: str) -> None:
    try:
        policy = Policy.parse(text)
    except RuleError:
        return
    assert Policy.parse(str(policy)) == policy


def test_a_policy_is_frozen_and_hashable() -> None:
    assert {Policy("bf16"): 1}[Policy("bf16")] == 1
    with pytest.raises(AttributeError):
        Policy().low = "fp16"  # type: ignore[misc]
