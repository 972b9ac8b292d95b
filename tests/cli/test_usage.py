"""Bad usage, completion and the pages of codes: what must answer before torch is there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict

import pytest
from typer.testing import CliRunner

from mpcompile.errors import pages
from mpcompile.tools.main import app

# (words, what the answer names).
MISUSED = (
    ("inspect absent.py:make", "MP802"),
    ("inspect absent.onnx", "MP802"),
    ("inspect json:make -p bf17", "MP201"),
    ("inspect json:make --ranges absent.json", "MP208"),
    ("explain absent.py:make x", "MP802"),
    ("explain json:make x -p low=bf17", "MP201"),
    ("explain json:make", "MP806"),
    ("explain MP999", "MP806"),
    ("compare absent.py:make", "MP802"),
    ("compare json:make -p bf17", "MP201"),
    ("compare json:make --batches 0", "MP811"),
    ("bisect absent.py:make --check loss<1", "MP802"),
    ("bisect json:make --check los<1", "MP812"),
    ("bisect json:make --check loss<1 -p bf17", "MP201"),
    ("calibrate absent.py:make", "MP802"),
    ("calibrate json:make --batches 0", "MP811"),
    ("watch absent.jsonl", "MP802"),
    ("diff json:make absent.json", "MP802"),
    ("diff json:make json:make --policy-b bf17", "MP201"),
    ("convert absent.onnx out.onnx", "MP802"),
    ("export json:make out.onnx -p bf17", "MP201"),
    ("bench --candidates expret", "MP820"),
    ("bench -p bf17", "MP201"),
    ("demo -p bf17", "MP201"),
)


def test_usage_errors_come_before_torch() -> None:
    """In a process of its own: neither a file that is not there nor a word that nothing knows waits for torch."""
    code = (
        "import sys; from typer.testing import CliRunner; from mpcompile.tools.main import app\n"
        f"for words in {[words.split() for words, _ in MISUSED]!r}:\n"
        "    done = CliRunner().invoke(app, words); print(done.exit_code, done.stderr.split(':')[0])\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"2 {code}" for _, code in MISUSED]


def test_a_shell_completes_words_codes_and_lists() -> None:
    """By the engine that the shell's own script calls, in one process for all."""
    code = (
        "import io, os, sys\n"
        "from contextlib import redirect_stdout\n"
        "from mpcompile.tools import main\n"
        "for line in sys.argv[1:]:\n"
        "    os.environ.update(_MPCOMPILE_COMPLETE='complete_bash', COMP_WORDS='mpcompile ' + line,\n"
        "                      COMP_CWORD=str(len(line.split(' '))))\n"
        "    with redirect_stdout(io.StringIO()) as said:\n"
        "        try: main.app(prog_name='mpcompile')\n"
        "        except SystemExit: pass\n"
        "    print('|'.join(said.getvalue().splitlines()))\n"
        "assert 'torch' not in sys.modules"
    )
    wanted = {
        "ben": "bench",
        "inspect t --after as": "assign",
        "inspect t --only b": "bf16",
        "inspect t -p f": "fp16|fp8|fp32",
        "bench --models gpt2,b": "gpt2,bert|gpt2,bert-by-hand",
        "bench --candidates pure": "pure BF16",
        "explain mp20": "|".join(code.lower() for code in pages() if code.startswith("MP20")),
    }
    done = subprocess.run([sys.executable, "-c", code, *wanted], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert dict(zip(wanted, done.stdout.splitlines(), strict=True)) == wanted


@pytest.mark.parametrize(("shell", "said"), [("zsh", '"simplify-casts"'), ("fish", "simplify-casts")])
def test_other_shells_complete_too(shell: str, said: str) -> None:
    """The script that a shell is given names the variables by which it asks, and the answer is in its form."""

    def call(**words: str) -> str:
        environment = {**os.environ, **words}
        code = "import sys; sys.argv = ['mpcompile']; from mpcompile.tools.start import main; main()"
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
        )
        assert "Traceback" not in done.stderr
        return done.stdout

    script = call(_MPCOMPILE_COMPLETE=f"source_{shell}")
    assert f"_MPCOMPILE_COMPLETE=complete_{shell}" in script
    assert "_TYPER_COMPLETE_ARGS=" in script
    asked = {"_TYPER_COMPLETE_ARGS": "mpcompile inspect t --after si", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    assert said in call(_MPCOMPILE_COMPLETE=f"complete_{shell}", **asked)


def test_a_code_is_answered_without_the_parser() -> None:
    """The page of an error, and the list of those that begin so: nothing else is imported for it."""
    code = (
        "import sys; sys.argv = ['mpcompile', 'explain', sys.argv[1]]; from mpcompile.tools.start import main; main()\n"
        "assert not {'typer', 'torch', 'networkx', 'rich'} & set(sys.modules)"
    )
    for word, said in (("mp203", "MP203: An override"), ("MP20", "MP201: ")):
        done = subprocess.run([sys.executable, "-c", code, word], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(said)
        assert CliRunner().invoke(app, ["explain", word]).stdout == done.stdout
    assert json.loads(CliRunner().invoke(app, ["explain", "MP203", "--json"]).stdout) == asdict(pages()["MP203"])


def test_no_page_sends_anybody_to_a_file_that_pip_does_not_bring() -> None:
    for page in pages().values():
        assert not re.search(r"\bdocs/|README|CONTRIBUTING", f"{page.cause} {page.remedy}"), page.code
