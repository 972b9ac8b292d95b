"""The benchmark: what it reports, and that one failing candidate does not end the others."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from mpcompile import Policy
from mpcompile.tools import bench, bench_loops, bench_run
from mpcompile.tools.bench_loops import Job, Plain
from mpcompile.tools.bench_models import MLP, WORKLOADS, Workload
from mpcompile.tools.bench_run import BenchSettings, Result
from mpcompile.tools.main import app

ROWS, WIDTH = 8, 32
WORKLOAD = Workload(
    lambda: MLP(WIDTH, 4),
    lambda rows: {"x": torch.randn(rows, WIDTH), "labels": torch.randint(0, 16, (rows,))},
    ROWS,
    unit="rows",
)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Without compilation, on a model of a few kilobytes."""
    monkeypatch.setitem(WORKLOADS, "mlp", lambda full: WORKLOAD)
    monkeypatch.setattr(bench_loops, "compiled", lambda model: model)
    monkeypatch.setattr(bench_run, "SLOT_SECONDS", 0.0)
    yield
    torch._dynamo.reset()


def test_the_profiler_writes_nothing() -> None:
    program = (
        "from mpcompile.tools.bench import quiet_profiler; quiet_profiler(); import torch;"
        "from mpcompile.tools.measure import peak_bytes; assert peak_bytes(lambda: torch.ones(4), 'cpu') == 16"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout + ran.stderr == ""


def job(micro: int = 1, policy: str = "bf16") -> Job:
    return Job(WORKLOAD, "cpu", Policy(policy), ROWS // micro, micro)


def test_json_has_every_figure(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    ways = "eager FP32,eager autocast"
    said = CliRunner().invoke(
        app,
        [
            *["bench", "-p", "bf16", "--models", "mlp", "--rounds", "3", "--check", "2", "--json"],
            "--candidates",
            ways,
            "-o",
            str(out),
        ],
    )
    assert said.exit_code == 0, said.stderr
    found = json.loads(said.stdout)
    assert found == json.loads(out.read_text())
    assert found["versions"]["torch"] == torch.__version__
    results = {one["candidate"]: one for one in found["models"]["mlp"]["results"]}
    single, low = results["eager FP32"], results["eager autocast"]
    assert len(single["times"]) == len(low["times"]) == 3
    assert single["saved"] == single["saved_fp32"] > low["saved_fp32"]
    assert single["versus"]["eager FP32"] == 1.0
    assert single["peak"] > single["saved"]
    assert single["difference"] == 0
    assert 0 < abs(low["difference"]) < 1e-2
    assert single["rate"] == pytest.approx(ROWS / single["seconds"])


def test_table_names_the_candidates() -> None:
    said = CliRunner().invoke(
        app, ["bench", "-p", "bf16", "--models", "mlp", "--candidates", "eager FP32", "--rounds", "1"]
    )
    assert said.exit_code == 0
    assert "eager FP32" in said.stdout
    assert "1 x 8 rows" in said.stdout


def test_a_failure_is_told_below_the_table() -> None:
    ways = "eager FP32,eager autocast"
    arguments = ["bench", "-p", "bf16", "--models", "mlp", "--candidates", ways, "--rounds", "1", "--max-seconds", "-1"]
    said = CliRunner().invoke(app, arguments)
    assert said.exit_code == 0
    assert said.stdout.count("failed") == 2
    assert "eager autocast: not run: out of time (--max-seconds)" in said.stdout


def test_one_failing_candidate_does_not_end_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(job: Job) -> Plain:
        raise MemoryError("no room\nsecond line")

    monkeypatch.setitem(bench_loops.CANDIDATES, "compile FP32", fails)
    said: list[str] = []
    names = ["eager FP32", "compile FP32", "pure BF16"]
    results = bench_run.measure(job(), names, BenchSettings(rounds=2, check=1), said.append)
    assert [one.candidate for one in results] == names
    assert results[1].error == "MemoryError: no room\nsecond line"
    assert results[1].seconds is None
    assert results[0].seconds
    assert results[2].seconds
    assert "compile FP32: MemoryError: no room" in said


def test_what_does_not_fit_the_time_is_left_out() -> None:
    (result,) = bench_run.measure(job(), ["eager FP32"], BenchSettings(max_seconds=-1.0), lambda _: None)
    assert "--max-seconds" in result.error


def test_microbatches_make_the_gradient_of_the_whole_batch() -> None:
    gradients = []
    for micro in (1, 4):
        torch.manual_seed(1)
        whole = WORKLOAD.sample(ROWS)
        work = job(micro)
        rows = ROWS // micro
        work.data[:] = [{k: v[i * rows : (i + 1) * rows] for k, v in whole.items()} for i in range(micro)]
        model = work.model()
        loop = Plain(work, model, model)
        kept = {}
        loop.optimizer.register_step_pre_hook(
            lambda *_, model=model, kept=kept: kept.update({n: p.grad.clone() for n, p in model.named_parameters()})
        )
        loop.step()
        gradients.append(kept)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_masters_of_mpcompile_are_cast_once_per_step_not_per_microbatch() -> None:
    """The eager backend here: the shadows are the same."""
    work = job(4)
    model = work.model()
    from mpcompile import mpcompile

    loop = Plain(work, model, mpcompile(model, "low=bf16,output=keep", backend="eager", low=["*"]))
    loop.step()
    result = Result("mpcompile")
    bench_run._held(result, loop, "cpu")
    shadows = sum(isinstance(m, nn.Linear) for m in model.modules())
    assert result.casts in (shadows, 2 * shadows)  # weights, and biases where the matmul reads them


def test_flops_of_a_step_are_three_forwards() -> None:
    forward = 2 * ROWS * (3 * WIDTH * WIDTH + WIDTH * 16)
    assert bench_run.flops_of(job()) == 3 * forward
    assert bench_run.flops_of(job(micro=4)) == 3 * forward


def test_ratio_is_of_the_same_round() -> None:
    """The machine halves its speed in the second round; the ratio does not see it."""
    assert bench_run._ratio(Result("a", [2.0, 4.0, 2.0]), Result("b", [1.0, 2.0, 1.0])) == 2.0


@pytest.mark.parametrize(
    ("option", "word", "near"),
    [("--models", "gtp2", "gpt2"), ("--candidates", "eager FP23", "eager FP32"), ("--device", "gpu", "cpu"),
     ("--size", "smal", "small"), ("--regime", "mini", "micro")],
)  # fmt: skip
def test_unknown_words_are_one_clear_error(option: str, word: str, near: str) -> None:
    said = CliRunner().invoke(app, ["bench", option, word])
    assert said.exit_code == 2
    assert "MP820" in said.stderr
    assert near in said.stderr


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # eager; compiled, it is fused
@pytest.mark.parametrize("name", [name for name in WORKLOADS if "by-hand" in name])
def test_models_by_hand_train_as_their_parts_say(name: str) -> None:
    """A loss near the logarithm of the classes, gradients everywhere, and a low stream that changes little."""
    workload = WORKLOADS[name](False)
    torch.manual_seed(0)
    model, batch = workload.build(), workload.sample(1)
    classes = 16384 if "input_ids" in batch else 1000
    batch["labels"] = torch.randint(0, classes, batch["labels"].shape)
    loss = model(**batch)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.dim() > 1)
    assert loss.item() == pytest.approx(torch.tensor(classes).log().item(), rel=0.1)
    model.stream = torch.bfloat16
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert model(**batch).item() == pytest.approx(loss.item(), rel=0.01)


def test_help_names_the_candidates_of_each_device() -> None:
    assert set(bench.CANDIDATES) == set(bench_loops.CANDIDATES)
    gpu_alone = set(bench_loops.candidates_for("cuda")) - set(bench_loops.candidates_for("cpu"))
    assert set(bench.CANDIDATES[-5:]) == gpu_alone
    text = "".join(CliRunner().invoke(app, ["bench", "--help"]).stdout.split())
    assert [name for name in bench.CANDIDATES if name.replace(" ", "") not in text] == []
