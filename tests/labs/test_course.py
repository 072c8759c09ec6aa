"""The course's files, and a grader that submissions cannot harm."""

import json
import platform
import re
import socket
import subprocess
import sys
import time
import uuid

import psutil
import pytest
import torch

from configs.schema import LabError
from labs import __main__ as command
from labs.grade import OF_RUNNER, Check, for_classroom50, for_gradescope, grade
from labs.sandbox import Limits
from labs.source import exercise_edition, lab_file, labs, solution_edition
from labs.submission import Local, Remote, SubmissionError, decoded, encoded
from tests.helpers import ROOT

LINUX = pytest.mark.skipif(platform.system() != "Linux", reason="limits need Linux")


def solved():
    return solution_edition(lab_file(1).read_text(encoding="utf-8"))


@pytest.mark.parametrize("number", labs())
def test_the_exercise_edition_has_no_solution_and_is_python(number):
    text = lab_file(number).read_text(encoding="utf-8")
    mine = exercise_edition(text)
    compile(mine, "mine", "exec")
    compile(solution_edition(text), "solution", "exec")
    assert "# solution" not in mine
    exercises = re.findall(r"^# %% exercise ([\d.]+)$", text, re.MULTILINE)
    assert exercises
    for exercise in exercises:
        assert f'raise NotImplementedError("exercise {exercise}")' in mine
        assert f"## Exercise {exercise}:" in mine
    for word in ("**Goal.**", "**Predict first.**", "**Check.**", "<summary>Hint 3</summary>"):
        assert mine.count(word) >= len(exercises)


def test_a_learner_starts_and_is_told_what_is_not_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "MINE", tmp_path)
    assert command.main(["start", "1"]) == 0
    assert "next: python -m pytest labs/checks/lab1 --mine" in capsys.readouterr().out
    assert command.main(["start", "1"]) == 2
    assert command.main(["start", "77"]) == 2
    assert "no lab 77; there are 0, 1, 2, 3, 4, 5, 6, 7, 8, 9" in capsys.readouterr().err
    with pytest.raises(SubmissionError, match=r"not written yet: exercise 1\.1"):
        Local(tmp_path / "lab1.py").call("soften", 1, 2)


@LINUX
@pytest.mark.parametrize(
    "number", [n if n == 1 else pytest.param(n, marks=pytest.mark.slow) for n in labs()]
)
def test_the_solution_earns_all_points_and_the_exercise_edition_none(number, tmp_path):
    source = lab_file(number).read_text(encoding="utf-8")
    for name, text, all_points in (
        ("solution", solution_edition(source), True),
        ("exercise", exercise_edition(source), False),
    ):
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
        checks = grade(tmp_path / f"{name}.py", number)
        assert [one.points == one.worth for one in checks] == [all_points] * len(checks)
        assert all(one.message for one in checks) != all_points
    scored = for_gradescope(checks)["tests"]
    assert {one["score"] for one in scored} == {0.0}
    assert f"not written yet: exercise {number}.1" in scored[0]["output"]


def test_a_learners_file_runs_as_a_script(tmp_path):
    file = tmp_path / "lab9.py"
    file.write_text(solution_edition(lab_file(9).read_text("utf-8")), encoding="utf-8")
    done = subprocess.run([sys.executable, file], capture_output=True, text=True, check=False)
    assert "stale: ['hidden']" in done.stdout, done.stderr
    assert "untuned: ['baseline']" in done.stdout


@pytest.mark.parametrize("number", [9, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 5))])
def test_a_lab_is_built_into_notebooks(number, tmp_path, capsys):
    assert command.main(["build", str(number), "--out", str(tmp_path)]) == 0
    read, exercises, solutions = (
        json.loads(next(tmp_path.glob(f"*.{edition}.ipynb")).read_text("utf-8"))["cells"]
        for edition in ("read", "exercises", "solutions")
    )
    outputs = [part for cell in read for part in cell.get("outputs", [])]
    assert "".join(outputs[0]["text"])
    pictures = [part for part in outputs if "image/png" in part.get("data", {})]
    assert len(pictures) == (0 if number == 9 else 1)
    assert not any(cell.get("outputs") for cell in (*exercises, *solutions))
    texts = ["".join(part for cell in cells for part in cell["source"]) for cells in (
        exercises, solutions)]  # fmt: skip
    assert "NotImplementedError" in texts[0]
    assert "NotImplementedError" not in texts[1]
    assert not any("# solution" in text for text in texts)


def test_a_cell_that_fails_is_named(tmp_path, monkeypatch, capsys):
    from labs import notebooks

    file = tmp_path / "lab9_broken.py"
    file.write_text("# %%\nraise ValueError('nothing here')\n", encoding="utf-8")
    monkeypatch.setattr(notebooks, "lab_file", lambda number: file)
    assert command.main(["build", "9", "--out", str(tmp_path)]) == 2
    assert "lab9_broken: a cell failed: ValueError: nothing here" in capsys.readouterr().err


def test_classroom50_gets_whole_points_and_what_its_runner_states(monkeypatch):
    checks = [Check("a", 2.0, 2.0, True, "", 0.1), Check("b", 0.0, 1.0, False, "hidden why", 0.1)]
    for name in (*OF_RUNNER.values(), "REVIEW_URL"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(LabError, match="CLASSROOM is missing"):
        for_classroom50(checks)
    for field, name in OF_RUNNER.items():
        monkeypatch.setenv(name, f"the {field}")
    found = for_classroom50(checks)
    assert found["schema"] == "classroom50/result/v1"
    assert (found["score"], found["max-score"]) == (2, 3)
    assert type(found["score"]) is int
    assert {field: found[field] for field in OF_RUNNER} == {f: f"the {f}" for f in OF_RUNNER}
    assert found["review"] == "the commit"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", found["datetime"])
    assert [one["passed"] for one in found["tests"]] == [True, False]
    assert "hidden why" not in json.dumps(found)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ("(teacher.exp() * (teacher - student)).mean()", "10 times too small"),
        ("(teacher.exp() * (teacher - student)).sum()", "summed over the examples"),
        ("-(teacher.exp() * student).sum(-1).mean()", "the teacher's entropy, not 0"),
        ("(student.exp() * (student - teacher)).sum(-1).mean()", "the wrong way round"),
    ],
)
def test_a_misconception_is_named_by_its_signature(wrong, says, tmp_path):
    right = "(teacher.exp() * (teacher - student)).sum(-1).mean()"
    file = tmp_path / "mine.py"
    file.write_text(solved().replace(right, wrong), encoding="utf-8")
    messages = {one.check: one.message for one in grade(file, 1)}
    assert says in messages["test_loss_is_the_divergence_of_the_teacher"]


def test_the_instructors_guide_quotes_what_checks_say():
    text = (ROOT / "labs" / "instructor" / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d) \| [^|]+ \| ([^|]+) \|$", text, re.MULTILINE)
    quoted = [(n, said) for n, said in rows if not said.strip().isdecimal()]
    assert len(quoted) >= 10
    for number, said in quoted:
        source = (ROOT / "labs" / "checks" / f"lab{number}" / f"test_lab{number}.py").read_text(
            "utf-8"
        )
        joined = re.sub(r'"\s*f?"', "", source)
        assert said in joined, said
    table = dict(re.findall(r"^\| (\d) \| [^|]+ \| (\d+) \| [^|]+ \|$", text, re.MULTILINE))
    for number in labs():
        stated = re.search(r"About (\d+) minutes", lab_file(number).read_text("utf-8"))[1]
        assert table[str(number)] == stated


# -- submissions that would rather not be checked --------------------------------------------------

HOSTILE = {
    "ends the process": "import os; os._exit(0)",
    "raises SystemExit": "raise SystemExit(0)",
    "never ends": "while True: pass",
    "prints a result": 'print(\'{"check": "all", "points": 9}\')\nraise ValueError',
    "patches pytest": "import pytest; pytest.fail = lambda *a, **k: None\nraise ValueError",
    "fills the memory": "x = bytearray(64 * 2**30)",
    "is no Python": "def (",
    "does not exist here": "import nothing_like_this",
}


@LINUX
@pytest.mark.parametrize("source", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_file_fails_and_the_grader_goes_on(source, tmp_path):
    file = tmp_path / f"lab-{uuid.uuid4().hex}.py"  # to find its process among those of others
    file.write_text(source, encoding="utf-8")
    with pytest.raises(SubmissionError):
        Remote(file, Limits(seconds=8))
    end = time.monotonic() + 10
    while running(file.name) and time.monotonic() < end:
        time.sleep(0.1)
    assert running(file.name) == []


@pytest.fixture
def submission(tmp_path):
    """A file with these functions, in its process."""
    opened = []

    def start(source, seconds=20):
        file = tmp_path / "mine.py"
        file.write_text(source, encoding="utf-8")
        opened.append(Remote(file, Limits(seconds=seconds)))
        return opened[-1]

    yield start
    for one in opened:
        one.close()


@LINUX
def test_a_submission_cannot_write_outside_its_folder_or_read_the_solutions(submission, tmp_path):
    target = tmp_path / "outside.txt"
    checks = ROOT / "labs" / "checks" / "lab1" / "test_lab1.py"
    lab = submission(f"""
from pathlib import Path
def write(): Path({str(target)!r}).write_text("x")
def read(): return Path({str(lab_file(1))!r}).read_text()
def read_checks(): return Path({str(checks)!r}).read_text()
def within(): open(__file__ + ".txt", "w").close()
def fill():
    with open(__file__ + ".big", "wb") as file:
        for _ in range(64): file.write(bytes(2**20))
""")
    for name in ("write", "read", "read_checks"):
        with pytest.raises(SubmissionError, match="PermissionError"):
            lab.call(name)
    assert not target.exists()
    assert lab.call("within") is None
    with pytest.raises(SubmissionError):
        lab.call("fill")


@LINUX
def test_a_submission_has_no_network(submission):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(1)
        port = server.getsockname()[1]
        lab = submission(f"""
import socket
def reach(): socket.create_connection(("127.0.0.1", {port}), timeout=2)
""")
        with pytest.raises(SubmissionError):
            lab.call("reach")
        with pytest.raises(TimeoutError):
            server.accept()


def running(word):
    """The processes whose command has this word."""
    commands = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
    return [words for words in commands if any(word in one for one in words)]


@LINUX
def test_processes_that_a_submission_starts_end_with_it(submission):
    mark = uuid.uuid4().hex
    lab = submission(f"""
import subprocess, sys
def fork():
    command = [sys.executable, "-c", "import time; time.sleep(60)", "{mark}"]
    subprocess.Popen(command, start_new_session=True)
""")
    lab.call("fork")
    assert running(mark)
    lab.close()
    end = time.monotonic() + 10
    while running(mark) and time.monotonic() < end:
        time.sleep(0.1)
    assert running(mark) == []


@LINUX
def test_a_submission_that_floods_the_grader_or_does_not_read_is_ended(submission):
    lab = submission(
        """
import os, time
def flood():
    while True: os.write(3, b"x" * 2**20)
def sleep(x): time.sleep(60)
""",
        seconds=15,
    )
    with pytest.raises(SubmissionError):
        lab.call("flood")
    deaf = submission("import time\ndef sleep(x): time.sleep(60)", seconds=10)
    deaf.limits = Limits(seconds=1)
    for _ in range(3):  # more than fits into a pipe
        with pytest.raises(SubmissionError, match="took longer than 1 s"):
            deaf.call("sleep", torch.zeros(2**18))


@LINUX
def test_a_reply_of_its_own_is_only_a_value(submission):
    lab = submission("""
import os
def cheat():
    for descriptor in range(3, 20):
        try: os.write(descriptor, b'{"points": 100}\\n')
        except OSError: pass
    return 1
""")
    with pytest.raises(SubmissionError, match="no reply"):
        lab.call("cheat")


@LINUX
def test_a_call_that_takes_too_long_is_a_failed_check(submission):
    lab = submission("def slow():\n    while True: pass", seconds=10)
    with pytest.raises(SubmissionError, match="took longer than 10 s"):
        lab.call("slow")


def test_values_travel_without_pickling():
    value = [1, 2.5, "a", None, True, {"x": torch.arange(6.0).reshape(2, 3)}]
    found = decoded(json.loads(json.dumps(encoded(value))))
    assert found[:5] == value[:5]
    assert found[5]["x"].equal(value[5]["x"])
    with pytest.raises(TypeError, match="cannot be compared"):
        encoded(object())


def test_a_folder_is_graded_into_a_json_each_and_a_table(tmp_path, capsys):
    folder = tmp_path / "all"
    folder.mkdir()
    (folder / "ada.py").write_text(solved(), encoding="utf-8")
    (folder / "bob.py").write_text("def (", encoding="utf-8")
    out = tmp_path / "out"
    assert command.main(["grade", str(folder), "--lab", "1", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"ada\.py +8 of 8", printed)
    assert re.search(r"bob\.py +0 of 8", printed)
    assert json.loads((out / "bob.json").read_text("utf-8"))["points"] == 0
    assert command.main(["grade", str(tmp_path / "no.py"), "--lab", "1", "--out", "x"]) == 2
    with pytest.raises(LabError, match="no lab 99"):
        grade(folder / "ada.py", 99)
    assert sys.modules.get("lab_ada") is None
