"""The figures of the README and of docs/benchmarks.md are those of the files that the benchmarks wrote."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGE = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
RESULTS = ROOT / "benchmarks" / "results"


def test_the_tables_are_what_their_script_prints() -> None:
    spec = importlib.util.spec_from_file_location("table", ROOT / "benchmarks" / "table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    shown = re.findall(r"<!-- (cpu|gpu|hand) table.*?-->\n(.*?)\n<!-- end -->", PAGE, re.DOTALL)
    cpu = module.table(module.load("cpu-bf16.json"), module.load("cpu-bf16-micro.json"))
    assert dict(shown) == {"cpu": cpu, "gpu": module.gpu_table(), "hand": module.hand_table()}


def test_the_step_options_are_those_measured() -> None:
    found = json.loads((RESULTS / "cpu-step-options.json").read_text(encoding="utf-8"))["options"]
    rows = dict(re.findall(r"^\| (no scale|dynamic scale|clipping|split masters) \| (.*) \|$", PAGE, re.MULTILINE))
    assert rows.keys() == found.keys()
    for name, cells in rows.items():
        one = found[name]
        assert cells == f"{one['ratio']:.2f} | {one['peak'] / 1e6:.0f} | {one['held'] / 1e6:.0f}"


def test_the_conversion_times_are_those_measured() -> None:
    found = json.loads((RESULTS / "onnx_models.json").read_text(encoding="utf-8"))["speed"]
    shown = re.findall(
        r"^\| ([\d,]+) \| (\d+) \+ (\d+) \+ (\d+) = (\d+) ms \| (\d+) ms \| (\d+) ms", PAGE, re.MULTILINE
    )
    keys = ("read", "decide", "write", "ours", "checker and strict inference", "all checks")
    assert len(shown) == len(found) == 3
    for (nodes, *cells), row in zip(shown, found, strict=True):
        assert int(nodes.replace(",", "")) == row["nodes"]
        assert [int(cell) for cell in cells] == [pytest.approx(row[key], abs=0.51) for key in keys]


def test_the_readme_s_rows_are_those_of_the_page() -> None:
    def rows(text: str) -> dict[str, list[str]]:
        found = (
            line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ") and "BF16" in line
        )
        return {cells[0]: cells[1:] for cells in found if len(cells) > 4}

    shown = re.findall(r"<!-- short table.*?-->\n(.*?)\n<!-- end -->", README, re.DOTALL)
    whole = re.findall(r"<!-- gpu table.*?-->\n(.*?)\n<!-- end -->", PAGE, re.DOTALL)
    short, full = rows(shown[0]), rows(whole[0])
    assert len(short) == 4
    # After four peers: drop-in and its peak, step and its peak.
    assert all(cells == full[name][4:8] for name, cells in short.items())
