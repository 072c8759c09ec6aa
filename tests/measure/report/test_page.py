"""The report."""

import json
import re

import pytest

import eval as judge
from configs.schema import CONTROLS
from measure.laws import students_differing_in
from measure.metrics import metrics_of
from measure.report.answers import SHOWN_POSITIONS, shown_rows
from measure.report.page import render_picture, template
from tasks import TASKS
from tasks.pronounce import Pronounce
from teacher.access import ACCESS
from tests.browser import opened, problems_of
from tests.helpers import ROOT, train_tiny


def test_the_report_is_one_self_contained_file(tiny_run):
    report = (tiny_run / "report.html").read_text(encoding="utf-8")
    for heading in ("Claims", "Results", "Cost", "Learning curves", "Calibration", "Glossary"):
        assert f"<h2>{heading}</h2>" in report
    assert "http://" not in report.replace("http://www.w3.org", "")
    assert "<script src" not in report
    assert "{{" not in report


def test_the_report_draws_what_the_recipes_have_in_common(methods_run):
    report = (methods_run.folder / "report.html").read_text("utf-8")
    for heading in ("Bytes against fidelity", "Temperature"):
        assert f"<h2>{heading}</h2>" in report
    assert "<h2>How many words</h2>" not in report
    result = json.loads((methods_run.folder / "eval.json").read_text("utf-8"))
    assert students_differing_in(result, ("temperature",)) == ["plain", "warm", "hot"]
    assert students_differing_in(result, ("access", "outputs.k")) == ["plain", "top_5", "sampled_6"]


@pytest.mark.parametrize("run", ["tiny_run", "methods_run"])
def test_a_reader_finds_the_report_legible_in_every_window(run, request):
    run = request.getfixturevalue(run)
    assert problems_of(getattr(run, "folder", run) / "report.html") == []


def test_buttons_show_the_answers_of_one_kind(tiny_run):
    with opened(tiny_run / "report.html") as page:
        rows = page.locator("#answers tbody tr")
        buttons = page.locator("[data-kind]")
        shown = {}
        for button in buttons.all():
            button.press("Enter")  # by keyboard
            assert button.get_attribute("aria-pressed") == "true"
            visible = [row for row in rows.all() if row.is_visible()]
            kind = button.get_attribute("data-kind")
            assert all(kind in (row.get_attribute("data-kinds") or "").split() for row in visible
                       if kind != "all")  # fmt: skip
            shown[kind] = len(visible)
        assert page.locator('[aria-pressed="true"]').count() == 1
    assert shown["all"] == max(shown.values()) > 0
    assert min(shown.values()) < shown["all"]


def test_numbers_of_every_kind_of_answer_are_those_of_the_whole_split(tiny_run):
    report = (tiny_run / "report.html").read_text(encoding="utf-8")
    result = json.loads((tiny_run / "eval.json").read_text("utf-8"))
    name, entry = next(iter(result["students"].items()))
    wrong, count = map(int, re.search(rf"{name} is wrong \((\d+) of (\d+)\)", report).groups())
    assert wrong / count == pytest.approx(entry["quality"]["word_error_rate"]["mean"])
    differ = int(re.search(rf"{name} differs from the teacher \((\d+) of", report)[1])
    assert 1 - differ / count == pytest.approx(entry["fidelity"]["sequence_agreement"]["mean"])


def test_every_term_of_a_result_is_in_the_glossary():
    assert all(CONTROLS.values())
    assert all(access.meaning for access in ACCESS.values())
    for task in TASKS.values():
        metrics = metrics_of(task)
        without = [n for n, metric in metrics.items() if not metric.meaning and not metric.steps]
        assert without == [], task.name


def test_pictures_in_documents_are_drawn_from_results():
    pictures = sorted((ROOT / "docs").glob("*.svg"))
    assert pictures
    for picture in pictures:
        result = json.loads((ROOT / "results" / f"{picture.stem}.json").read_text(encoding="utf-8"))
        assert picture.read_text(encoding="utf-8") == render_picture(result)
        assert f"docs/{picture.name}" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_text_of_a_run_cannot_become_markup():
    page = template("check.html").render(name="<b>", lines=["<script>"], seeds=0, figure=None)
    assert "<b>" not in page
    assert "<script>" not in page


def test_examples_are_familiar_rows_or_else_evenly_spaced_ones():
    task = Pronounce()
    rows = task.rows("heldout")
    assert [task.question(rows, i) for i in shown_rows(task, rows, 8)] == [*task.familiar]
    few = Pronounce(limit=600)  # where none of them is left
    rows = few.rows("heldout")
    assert shown_rows(few, rows, 4) == [i * len(rows) // 4 for i in range(4)]
    digits = TASKS["digits"]
    assert digits.familiar == ()


def test_no_line_ends_between_a_number_and_its_percent_sign(tiny_run):
    page = (tiny_run / "report.html").read_text(encoding="utf-8")
    assert "5\N{NO-BREAK SPACE}% of" in page
    assert not re.search(r"\d %", page)


@pytest.mark.slow
def test_the_page_of_texts_speaks_of_no_right_answers(tmp_path):
    recipes = "recipes={heard: {access: text, sequences: teacher, objective: cross_entropy}}"
    task = "task={name: text, vocabulary: 300, limit: 60}"
    settings = (task, recipes, "controls=[baseline]", "verdicts=[]", "seeds=[0]")
    assert train_tiny(tmp_path, *settings, "teacher.training.prompt_weight=0") == 0
    assert judge.main([str(tmp_path / "tiny")]) == 0
    report = (tmp_path / "tiny" / "report.html").read_text(encoding="utf-8")
    assert "in the data" in report
    for absent in (">right answers<", "an answer is wrong", "teacher errors copied"):
        assert absent not in report
    longest = max(len(re.findall("<tr>", part)) for part in report.split("<h3>")[1:])
    assert longest <= SHOWN_POSITIONS + 2
