"""The example scripts, tiny: each trains, and its mixed curve is its FP32 curve within what 16 bits can do."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = ("graph", "vision", "diffusion", "gan", "ppo", "speech")


def test_every_example_is_here() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*NAMES, "curves", "lora_llama", "train_gpt"}


@pytest.mark.parametrize("name", [NAMES[0], *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES[1:])])
def test_both_curves_go_the_same_way(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    for loaded in {"curves", name} & sys.modules.keys():
        monkeypatch.delitem(sys.modules, loaded)
    full, mixed = importlib.import_module(name).main(["--tiny", "--policy", "bf16,device=free-low"])
    assert mixed == pytest.approx(full, abs=0.02)
    assert mixed != full, "nothing was low"
    # Two players' losses, and a surrogate one, do not fall.
    if name not in ("gan", "ppo"):
        assert min(full[-2:]) < full[0]
