"""The one line and the stages: where they go, and when nobody hears them."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mpcompile import progress

ROOT = Path(__file__).parents[2]
SCRIPT = """
import torch
from mpcompile import mpcompile
mp = mpcompile(torch.nn.Linear(4, 4), "low=bf16,device=free-low", backend="eager")
mp(torch.ones(2, 4))
step = mp.train_step(torch.optim.SGD(mp.parameters(), lr=0.1), lambda m, x: m(x).sum())
step(torch.ones(2, 4))
print("done")
"""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a program that has configured no logging."""
    monkeypatch.setattr(progress.log, "hasHandlers", lambda: False)
    monkeypatch.delenv(progress.SWITCH, raising=False)


@pytest.mark.usefixtures("alone")
def test_stages_show_on_a_terminal_and_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", (terminal := Terminal()))
    with progress.stage("reading"), progress.stage("deciding"):
        pass
    progress.line("mpcompile: 3 nodes")
    shown = terminal.getvalue()
    assert "mpcompile: reading (0.0 s)" in shown
    assert "mpcompile: reading > deciding (0.0 s)" in shown
    assert shown.endswith(f"{progress.CLEAR}{progress.CLEAR}mpcompile: 3 nodes\n")


@pytest.mark.usefixtures("alone")
def test_a_pipe_gets_the_line_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", (pipe := io.StringIO()))
    with progress.stage("reading"):
        progress.line("mpcompile: 3 nodes")
    assert pipe.getvalue() == "mpcompile: 3 nodes\n"


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(("name", "value"), [(progress.SWITCH, "0"), ("RANK", "1")])
def test_it_is_silent_when_told_and_on_other_ranks(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stderr", (terminal := Terminal()))
    with progress.stage("reading"):
        progress.line("mpcompile: 3 nodes")
    assert terminal.getvalue() == ""


def test_configured_logging_gets_it_instead(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.INFO, logger="mpcompile"):
        progress.line("mpcompile: 3 nodes")
    assert caplog.messages == ["mpcompile: 3 nodes"]
    assert capsys.readouterr().err == ""


def test_a_program_sees_one_line_a_graph_and_tlparse_its_report(tmp_path: Path) -> None:
    kept = {name: value for name, value in os.environ.items() if name != "MPCOMPILE_PROGRESS"}
    environment = {**kept, "TORCH_TRACE": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, env=environment, capture_output=True, text=True,
                          check=True)  # fmt: skip
    lines = [one for one in done.stderr.splitlines() if one.startswith("mpcompile: ")]
    assert len(lines) == 2
    assert all("bf16" in one and "low=bf16" in one for one in lines)
    assert done.stdout == "done\n"
    reports = [json.loads(text) for file in tmp_path.iterdir() for text in artefacts(file, "mpcompile_report")]
    assert [one["schema"] for one in reports] == ["mpcompile.report/1"] * 2
    assert all(one["nodes"] and one["policy"].startswith("low=bf16") for one in reports)


def artefacts(trace: Path, name: str) -> list[str]:
    """The payloads of that name, as tlparse reads them: a line with facts in JSON, and lines that begin with a tab."""
    found, wanted = list[list[str]](), False
    for line in trace.read_text(errors="replace").splitlines():
        if line.startswith("\t"):
            if wanted:
                found[-1].append(line[1:])
            continue
        facts = json.loads(line[line.index("{") :]) if "{" in line else {}
        wanted = facts.get("artifact", {}).get("name") == name
        found += [[]] if wanted else []
    return ["\n".join(lines) for lines in found]
