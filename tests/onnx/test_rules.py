"""Every operator that can come has a rule."""

from __future__ import annotations

import re
from pathlib import Path

import onnx
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as state

from mpcompile.onnx.schema import op_name
from mpcompile.rules.table import rules_for


def test_every_operator_of_the_installed_onnx_has_a_rule() -> None:
    rules = rules_for("onnx")
    names = {op_name(schema.domain, schema.name) for schema in onnx.defs.get_all_schemas_with_history()}
    assert len(names) > 200
    assert sorted(name for name in names if rules.get(name) is None) == []


def test_every_operator_that_onnx_runtimes_optimizer_makes_has_a_rule() -> None:
    rules = rules_for("onnx")
    known = {schema.name for schema in state.get_all_operator_schema() if schema.domain == "com.microsoft"}
    folder = Path(onnxruntime.__file__).parent / "transformers"
    texts = [
        file.read_text(encoding="utf-8") for file in folder.glob("*.py") if re.match("fusion|onnx_model", file.name)
    ]
    named = {name for text in texts for name in re.findall(r'"(\w+)"', text)} & known
    assert {"SkipLayerNormalization", "MultiHeadAttention", "BiasGelu"} <= named
    assert sorted(name for name in named if rules.get(f"com.microsoft::{name}") is None) == []
