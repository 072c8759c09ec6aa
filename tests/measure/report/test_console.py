"""Results in a terminal."""

import json

import numpy as np
import pytest

from measure.evaluate import Answers
from measure.report.console import grade_of, print_answers, print_result
from measure.report.tables import models_table, more_tables
from tasks.pronounce import Pronounce
from tasks.reason import Reason
from tasks.text import Text
from tests.helpers import RESULTS


@pytest.mark.parametrize("width", [80, 100, 120])
@pytest.mark.parametrize("file", RESULTS, ids=lambda file: file.stem)
def test_a_result_fits_the_terminal_and_loses_no_cell(file, width, monkeypatch, capsys):
    result = json.loads(file.read_text(encoding="utf-8"))
    monkeypatch.setenv("COLUMNS", str(width))
    print_result(result)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width
    shown = {cell.strip() for line in lines if line.startswith("|") for cell in line.split("|")}
    for _, _, rows in [models_table(result, interval=True), *more_tables(result)]:
        assert {part for row in rows for cell in row for part in cell.split("; ")} <= shown


def test_answers_are_graded_where_right_ones_are_known():
    words, problems, documents = Pronounce(limit=100), Reason(limit=100), Text
    assert grade_of("L AE B", ["L AE B", "L AA B"], words) == "right"
    assert grade_of("L AA", ["L AE B", "L AA B"], words) == "wrong"
    assert grade_of("L AA", [], words) == ""
    truth = "<think> 7+5=12 </think> 12"
    assert grade_of("<think> 5+7=12 </think> 12", [truth], problems) == "right"  # another way
    assert grade_of("<think> 7+5=12 </think> 13", [truth], problems) == "wrong"
    assert grade_of("and then", ["and so"], documents) == ""  # others would be as good


def test_a_long_answer_leaves_room_for_its_grade(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    answers, task = {"teacher": Answers(["L AE B " * 40], np.array([-1.0]))}, Pronounce(limit=100)
    print_answers(next(iter(task.words)), answers, task, {})
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    assert "... | wrong | 0.368 |" in printed
