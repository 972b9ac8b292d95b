"""`mpcompile compare` on factories."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from mpcompile.tools.main import app

FACTORY = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 4)
    def forward(self, x):
        return self.b(torch.tanh(self.a(x))).square().mean()

def make(batch=0):
    torch.manual_seed(0)
    return Net(), (torch.randn(8, 16) * (batch + 1),)

def same():
    torch.manual_seed(0)
    return Net(), (torch.ones(8, 16),)

def drawn():
    return Net(), (torch.randn(8, 16),)
"""


@pytest.fixture
def target(tmp_path: Path) -> str:
    (tmp_path / "net_to_compare.py").write_text(FACTORY)
    return f"{tmp_path / 'net_to_compare.py'}"


def call(*words: str, code: int = 0) -> Result:
    done = CliRunner().invoke(app, ["compare", *words, "-p", "low=bf16,device=free-low"])
    assert done.exit_code == code, done.output
    return done


def test_the_table_has_what_was_asked_for(target: str) -> None:
    text = call(f"{target}:make", "--rows", "3").stdout
    assert "loss (the model's loss)" in text
    assert "worst first: 3 of" in text
    assert "autocast" in text
    assert "a.weight" in text


def test_the_page_is_written_beside_the_table(target: str, tmp_path: Path) -> None:
    assert f"written: {tmp_path / 'page.html'}" in call(f"{target}:make", "--html", str(tmp_path / "page.html")).stdout
    assert "a.weight" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_batches_are_joined(target: str) -> None:
    found = json.loads(call(f"{target}:make", "--batches", "2", "--no-autocast", "--json").stdout)
    assert found["batches"] == 2
    assert found["autocast"] is None
    one = json.loads(call(f"{target}:make", "--no-autocast", "--json").stdout)
    largest = {row["id"]: row["largest"] for row in one["values"]}
    assert {row["id"]: row["largest"] for row in found["values"]}["linear"] > 1.5 * largest["linear"]
    assert json.loads(call(f"{target}:drawn", "--batches", "2", "--values", "--json").stdout)["gradients"] == []


def test_what_cannot_be_is_said(target: str) -> None:
    assert "MP811" in call(f"{target}:same", "--batches", "2", code=2).stderr
    assert "MP811" in call(f"{target}:make", "--batches", "0", code=2).stderr
    assert "MP800" in call(f"{target}:make", "--samples", "data.npz", code=2).stderr
    call(f"{target}:make", "--max-error", "1e-9", "--no-autocast", code=1)
    call(f"{target}:make", "--max-error", "0.5", "--no-autocast")
