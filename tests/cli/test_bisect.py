"""`mpcompile bisect`: known culprits are found, in few trials, and the line that it ends in mends the plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from mpcompile.tools.main import app

FACTORY = '''
import torch
from torch import nn

class Cancels(nn.Module):
    """In BF16 the sum has lost what the difference is about."""
    def forward(self, x):
        return (x + 1000.0) - 1000.0

class Net(nn.Module):
    def __init__(self, bad):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))
        self.bad = nn.ModuleDict({str(i): Cancels() for i in bad})
    def forward(self, x):
        for i, layer in enumerate(self.layers):
            x = torch.tanh(layer(x))
            if str(i) in self.bad:
                x = self.bad[str(i)](x)
        return x.square().mean()

def make(bad=(2,)):
    torch.manual_seed(0)
    return Net(bad), (torch.randn(32, 16),)

def two():
    return make((0, 3))

def close(mp):
    args = make()[1]
    return abs(float(mp(*args).detach()) - float(mp.model(*args).detach())) < 0.02 * float(mp.model(*args).detach())

def broken(mp):
    raise KeyError("lost")
'''


@pytest.fixture
def target(tmp_path: Path) -> str:
    (tmp_path / "net_to_bisect.py").write_text(FACTORY)
    return f"{tmp_path / 'net_to_bisect.py'}"


def call(*words: str, code: int = 0) -> Result:
    done = CliRunner().invoke(app, ["bisect", *words, "-p", "low=bf16,device=free-low", "--low", "*"])
    assert done.exit_code == code, done.output
    return done


def data(*words: str, code: int = 0) -> Any:
    return json.loads(call(*words, "--json", code=code).stdout)


def test_one_culprit_and_the_line_that_mends_it(target: str) -> None:
    lines = call(f"{target}:make", "--check", "loss<0.02").stdout.splitlines()
    assert lines[-1] == 'keep_fp32=["bad.2"]'
    assert len(lines) <= 12
    assert "of 14 nodes in FP32: fails (loss" in lines[0]
    mended = ["compare", f"{target}:make", "-p", "low=bf16,device=free-low", "--keep-fp32", "bad.2", "--no-autocast"]
    assert CliRunner().invoke(app, [*mended, "--max-error", "0.2"]).exit_code == 0


def test_a_log_lets_it_go_on(target: str, tmp_path: Path) -> None:
    log = tmp_path / "trials.jsonl"
    first = data(f"{target}:make", "--check", "loss<0.02", "--log", str(log))
    lines = log.read_text().splitlines()
    assert len(lines) == 1 + len(first["trials"])
    log.write_text("\n".join(lines[:4]) + "\n" + lines[4][:7])  # killed while it wrote
    again = data(f"{target}:make", "--check", "loss<0.02", "--log", str(log))
    assert again["keep_fp32"] == first["keep_fp32"]
    kept = [json.loads(line)["kept"] for line in log.read_text().splitlines()[1:]]
    assert kept == [trial["kept"] for trial in first["trials"]]
    assert "MP813" in call(f"{target}:make", "--check", "loss<0.03", "--log", str(log), code=2).stderr


def test_a_function_of_the_users_judges(target: str) -> None:
    assert data(f"{target}:make", "--check", f"{target}:close")["keep_fp32"] == ["bad.2"]
    assert "MP804" in call(f"{target}:make", "--check", f"{target}:broken", code=2).stderr


def test_usage_errors_come_before_anything_is_loaded(target: str) -> None:
    assert "MP812" in call(f"{target}:make", "--check", "los<1", code=2).stderr
    assert "did you mean 'loss'" in call(f"{target}:make", "--check", "los<1", code=2).stderr
    assert "MP802" in call(f"x{target}:make", "--check", "loss<1", code=2).stderr


def test_ends_without_a_culprit(target: str) -> None:
    assert data(f"{target}:make", "--check", "loss<10")["keep_fp32"] == []
    assert data(f"{target}:make", "--check", "loss<0", code=1)["passes"] is False


@pytest.mark.slow
def test_several_culprits(target: str) -> None:
    assert data(f"{target}:two", "--check", "loss<0.01 and gradient<0.05")["keep_fp32"] == ["bad.0", "bad.3"]


def test_onnx_files_too(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    from onnx_models import noise, parse

    model = parse(
        """big (float[n, 8] x) => (float[n, 8] y) {
            a = MatMul(x, w)
            b = Mul(a, large)
            c = Div(b, large)
            y = MatMul(c, w)
        }""", w=noise(8, 8), large=noise(1)[0] * 0 + 60000.0)  # fmt: skip
    onnx.save(model, tmp_path / "m.onnx")
    words = ["bisect", str(tmp_path / "m.onnx"), "--check", "output<0.01 and finite", "--low", "*", "--json"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["nodes"]
    assert len(found["nodes"]) < 4
