"""What reaches the terminal."""

import os
import signal
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO

import pytest

import eval as judge
from configs.command import run_command
from configs.files import printable
from configs.schema import LabError
from experiment.command import command_line
from tests.helpers import ROOT

ESCAPES = "\x1b[31m\x1b]0;title\x07\u202e\x9b2J\r"


def test_control_characters_are_shown_as_escapes():
    shown = printable(f"a{ESCAPES}b\u00e9\n")
    assert shown == "a\\x1b[31m\\x1b]0;title\\x07\\u202e\\x9b2J\\rb\u00e9\n"


def test_an_error_is_one_line_without_control_characters(capsys):
    def fail():
        raise LabError(f"bad {ESCAPES}\nsecond line")

    assert run_command(fail, "") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert not set(error) & set("\x1b\x07\x9b\r\u202e")


def test_a_command_runs_where_output_is_no_terminal(capsys):
    """In a notebook, say."""
    stream = StringIO()
    with redirect_stdout(stream):
        assert run_command(lambda: print("done") or 0, "") == 0
    assert stream.getvalue() == "done\n"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows forbids these names")
def test_neither_markup_nor_escapes_of_a_path_reach_the_terminal(copy, capsys):
    place = copy.rename(copy.parent / "[bold]\x1b[31m")
    assert judge.main([str(place)]) == 0
    output = capsys.readouterr().out
    assert "[bold]\\x1b[31m" in output
    assert "\x1b" not in output


def test_a_terminal_without_a_letter_shows_its_code(copy):
    """The answers of a task may hold any letter."""
    command = [sys.executable, str(ROOT / "eval.py"), str(copy), "--ask", "na\u00efve\u4e2d"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1


HELP = """
import runpy, sys
sys.argv = [sys.argv[1], "--help"]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    assert not {"torch", "numpy", "transformers"} & sys.modules.keys()
"""


@pytest.mark.parametrize("script", ["train.py", "eval.py"])
def test_help_is_shown_before_the_imports_that_take_seconds(script):
    command = [sys.executable, "-c", HELP, str(ROOT / script)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: {script} ")


def run_in_the_foreground(command, **options):
    """A job in the background would ignore Ctrl-C, and so would what it starts."""
    return subprocess.run(
        command, capture_output=True, text=True, check=False,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), **options,
    )  # fmt: skip


INTERRUPT = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)\n"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signal")
@pytest.mark.parametrize("script", ["train.py", "eval.py"])
def test_ctrl_c_during_imports_ends_without_a_traceback(script, tmp_path):
    (tmp_path / "torch.py").write_text(INTERRUPT, "utf-8")
    command = [sys.executable, str(ROOT / script), "configs/tiny.yaml"]
    done = run_in_the_foreground(command, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


TWICE = """
import os, signal, time
from configs.command import run_command
from experiment.command import command_line

def work():
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(9)
    finally:  # a second Ctrl-C while the first cleans up
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(9)

raise SystemExit(run_command(work, "rerun to resume"))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signal")
def test_ctrl_c_twice_is_as_calm_as_once():
    done = run_in_the_foreground([sys.executable, "-c", TWICE], cwd=ROOT)
    assert (done.returncode, done.stderr) == (130, "\nstopped; rerun to resume\n")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signal")
def test_a_job_in_the_background_goes_on_at_ctrl_c():
    """A shell lets it ignore Ctrl-C, which is meant for what runs in the foreground."""
    code = INTERRUPT.replace("9", "0") + "print('went on')"
    work = TWICE.split("def work")[0] + f"raise SystemExit(run_command(lambda: exec({code!r}), ''))"
    done = subprocess.run(
        [sys.executable, "-c", work], cwd=ROOT, capture_output=True, text=True, check=False,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "went on\n", "")


@pytest.mark.skipif(sys.platform == "win32", reason="other quotes")
def test_a_printed_command_works_where_the_reader_stands(tmp_path, monkeypatch):
    """Before they have activated an environment, after, elsewhere, and with uv."""
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch(mode=0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr("experiment.command.ROOT", tmp_path)
    monkeypatch.setenv("PATH", "/usr/bin")
    monkeypatch.delenv("UV", raising=False)
    monkeypatch.chdir(tmp_path)
    assert command_line("eval.py", "runs/a b", "--ask", "it's") == (
        ".venv/bin/python eval.py 'runs/a b' --ask 'it'\"'\"'s'"
    )
    monkeypatch.setenv("PATH", f"{python.parent}:/usr/bin")
    assert command_line("eval.py", 3) == "python eval.py 3"
    monkeypatch.setenv("UV", "/bin/uv")
    assert command_line("eval.py") == "uv run python eval.py"
    monkeypatch.delenv("UV")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert command_line("train.py") == f"python {tmp_path}/train.py"
