"""Tables: in the console, the documents and the report."""

import json
import re

import pytest

from measure.laws import Law
from measure.report.documents import (
    BLOCK,
    pages,
    shared_with_others,
    with_minutes,
    with_tables,
    work_line,
)
from measure.report.sentences import (
    accuracies_by_steps,
    facts_of,
    law_line,
    traces_kept,
    where_traces_pay,
)
from measure.report.tables import (
    claim_cell,
    in_a_cell,
    more_cells,
    more_headings,
    per_seed_values,
)
from tasks.task import Metric
from tests.helpers import RECIPES, RESULTS, ROOT


def test_every_method_is_compared_with_the_same_two_and_corrected_for_all(methods_run, capsys):
    result = json.loads((methods_run.folder / "eval.json").read_text("utf-8"))
    claims = [verdict["claim"] for verdict in result["verdicts"]]
    assert len(claims) == len(set(claims)) == 2 * (len(RECIPES) - 1) - 1
    assert "assistant beats baseline" not in claims  # it had half the budget
    assert "own beats baseline" in claims
    assert "own beats plain" in claims
    assert "plain beats plain" not in claims
    headings, cells = more_headings(result), more_cells(result, "own")
    assert headings == [
        "bytes per token", "agreement with teacher against baseline",
        "agreement with teacher against plain",
    ]  # fmt: skip
    assert cells[0] == "-"  # nothing is stored of what is scored live
    own = next(v for v in result["verdicts"] if v["claim"] == "own beats baseline")
    assert cells[1] == f"{100 * own['difference']:+.1f} {in_a_cell(own)}"
    assert more_cells(result, "plain")[2] == "-"
    (fact,) = facts_of(result)
    assert fact.startswith(f"{len(claims)} comparisons in one run, over rows alone: ")
    assert "after Dunnett's correction" in fact


def test_values_of_seeds_are_named_by_model_metric_and_other_split():
    def entry(*values):
        return {"quality": {"word_error_rate": {"per_seed": [*values]}}, "fidelity": {}}

    result = {
        "config": {"task": {"name": "pronounce"}},
        "split": "heldout",
        "teacher": entry(0.1) | {"long": entry(0.5)},
        "students": {"text": entry(0.2, 0.3) | {"long": entry(0.6, 0.7)}},
        "controls": {},
        "verdicts": [],
    }
    assert per_seed_values(result) == {
        "teacher word_error_rate": [0.1],
        "teacher word_error_rate (long)": [0.5],
        "text word_error_rate": [0.2, 0.3],
        "text word_error_rate (long)": [0.6, 0.7],
    }


def test_the_numbers_in_documents_equal_those_in_results():
    texts = [page.read_text(encoding="utf-8") for page in pages(ROOT)]
    named = [m[3] for text in texts for m in BLOCK.finditer(text) if m[2] == "results"]
    shown = {file.stem for file in RESULTS} - {"trace-float64"}
    assert sorted(named) == sorted(shown)
    assert [with_tables(text, ROOT / "results") for text in texts] == texts


def test_configs_state_the_minutes_of_their_committed_run():
    for file in RESULTS:
        result = json.loads(file.read_text(encoding="utf-8"))
        config = ROOT / "configs" / file.with_suffix(".yaml").name
        text = config.read_text(encoding="utf-8")
        assert with_minutes(text, result) == text, file.stem


def test_a_changed_result_would_change_the_documents(tmp_path):
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages(ROOT))
    shown = [f for f in RESULTS if f"results/{f.name} -->" in text]
    assert len(shown) >= 5
    for file in shown:
        result = json.loads(file.read_text(encoding="utf-8"))
        result |= {"verdicts": [], "map": [], "laws": {}, "heldout_reads": 1}
        tables = []
        for change in (0.0, 0.01):
            next(iter(result["teacher"]["quality"].values()))["mean"] += change
            (tmp_path / file.name).write_text(json.dumps(result), encoding="utf-8")
            tables.append(with_tables(text, tmp_path))
        assert tables[0] != tables[1], file.name
        (tmp_path / file.name).unlink()


def test_a_claim_of_one_run_is_shown_with_the_committed_runs():
    metric = Metric("word errors", "%", True, "wrong")
    verdict = {
        "difference": -0.0123, "ci95": [-0.03, 0.004], "result": "one run",
        "here": "not distinguished", "committed": None,
    }  # fmt: skip
    assert claim_cell(verdict, metric) == "-1.2 [-3.0, 0.4]"
    verdict |= {"here": "worse", "difference": 0.0004}
    assert claim_cell(verdict, metric) == "+0.0 [-3.0, 0.4] worse here"
    verdict["committed"] = {"mean": 0.015, "spread": 0.0048, "runs": 10, "ahead": 9}
    expected = "+0.0 [-3.0, 0.4] worse here; 10 runs: +1.5 ± 0.5, ahead in 9"
    assert claim_cell(verdict, metric) == expected
    assert claim_cell(None, metric) == "-"


def test_accuracies_by_steps_are_a_line_per_model_with_a_bar_between_the_splits():
    def entry(*values):
        steps = zip(range(1, 9), values, strict=True)
        quality = {f"accuracy_{n}": {"mean": value} for n, value in steps}
        return {"quality": {n: v for n, v in quality.items() if int(n[-1]) < 6}} | {
            "long": {"quality": {n: v for n, v in quality.items() if int(n[-1]) > 5}}
        }

    result = {
        "config": {"task": {"name": "reason"}},
        "split": "heldout",
        "teacher": entry(1, 0.99, 0.98, 0.97, 0.96, 0.2, 0.1, 0),
        "students": {"text": entry(0.5, 0.4, 0.3, 0.2, 0.1, 0, 0, 0)},
        "controls": {},
    }
    assert accuracies_by_steps(result) == [
        "teacher: right answers % at 1, 2, ... steps: 100  99  98  97  96 | 20  10  0",
        "text: right answers % at 1, 2, ... steps: 50  40  30  20  10 | 0  0  0",
    ]


def test_the_work_of_a_run_is_told_from_its_tuning():
    def stage(name, minutes, memory):
        return {"stage": name, "seconds": 60 * minutes, "peak_memory_mb": memory}

    stages = [stage("tuning", 14, 0), stage("teacher", 2, 700), stage("evaluation", 1, 800)]
    result = {
        "cost": {"stages": stages},
        "config": {"workers": 2},
        "environment": {"trained": {"cores": 4, "cpu": "a processor"}},
        "heldout_reads": 1,
    }
    end = (
        "shared by 2 processes of at most 800 MB, on 4 cores of a processor; this run read the "
        "held-out split once"
    )
    assert work_line(result) == f"3 minutes of work, after 14 minutes of tuning, {end}"
    del stages[0]
    assert work_line(result) == f"3 minutes of work, {end}"


def test_the_minutes_in_a_config_are_those_of_its_run():
    stages = [
        {"stage": "tuning", "seconds": 9_000.0},
        {"stage": "teacher", "seconds": 200.0},
        {"stage": "students/text/seed-0", "seconds": 180.0},
        {"stage": "students/text/seed-1", "seconds": 140.0},
    ]
    result = {"cost": {"stages": stages, "load_of_others": 0.01}, "config": {"workers": 2}}
    text = "# A study. About 99 minutes on 2\n# cores. About 1 minutes of it for the teacher.\n"
    written = with_minutes(text, result)
    assert written == text.replace("99", "6")  # 200 s + 320 s / 2
    result["cost"]["load_of_others"] = 0.3
    assert with_minutes(text, result) == text


@pytest.mark.parametrize("load", [None, 0.0, 0.05])
def test_a_machine_that_was_hardly_shared_is_not_called_shared(load):
    assert shared_with_others({"cost": {"load_of_others": load}}) == ""
    expected = ", shared with other programs (20 % of its work)"
    assert shared_with_others({"cost": {"load_of_others": 0.2}}) == expected


def test_the_map_in_words_names_the_steps_of_each_result():
    found = {1: "better", 2: "not distinguished", 3: "better"}
    cells = [
        {"claim": "a beats b", "steps": steps, "result": result, "here": None}
        for steps, result in found.items()
    ]
    cells.append({"claim": "c beats b", "steps": 1, "result": "one run", "here": "worse"})
    assert where_traces_pay(cells) == [
        "a against b by number of steps (exploratory, 4 cells): better at 1, 3; not distinguished "
        "at 2",
        "c against b by number of steps (exploratory, 4 cells): worse at 1",
    ]


def law(study, **changed):
    found = {
        "x": {"few": 1000, "many": 3000},
        "law": [40.0, 0.5, 0.25, 0.0],
        "law_ci95": [[30, 50], [0.4, 0.6], [0.2, 0.3], [0, 0]],
        "residuals": {"few": 0.011, "many": -0.049},
    }
    students = {
        name: {"fidelity": {"kl_teacher_student": {"mean": kl}}}
        for name, kl in (("few", 0.5), ("many", 0.3))
    }
    result = {"config": {"task": {"name": "pronounce"}}, "students": students}
    return law_line(result, study, found | changed)


def test_a_law_is_a_line_with_its_intervals_residuals_and_the_closest_student():
    assert law("rows") == (
        f"KL to teacher = {Law(40.0, 0.5, 0.25, 0.0)} nats, x the number of different words; 95 % "
        "intervals in this order 30 to 50, 0.4 to 0.6, 0.2 to 0.3; residuals at most 5 %; of those "
        "tried, many is closest to the teacher"
    )
    line = law("rows", law=None)
    assert line.endswith("different words: too few students for a law; many is closest")
    turning = {"law": [0.1, 0.5, 0.2, 0.9], "identified": True, "minimum_at": 0.123}
    line = law("size", **turning, minimum_ci95=[0.09, 0.161])
    assert "x the student's share of the teacher's parameters; " in line
    assert "0.2 to 0.3, 0 to 0; residuals" in line
    assert "minimum at 0.12 [0.09, 0.16]; of those tried" in line
    assert "minimum at 0.12 [0.12, 0.12]" in law("size", **turning)


@pytest.mark.parametrize(
    ("without", "said"),
    [
        ({"a": 0.1, "b": 0.3}, "without one of the students it lies between 0.1 and 0.3"),
        ({"a": 0.1, "b": None}, "0.1 and 0.1, or not within the sizes tried (1 times)"),
        ({"a": None, "b": None}, "without any one of the students there is none"),
    ],
)
def test_a_minimum_that_one_student_decides_is_not_given(without, said):
    line = law("size", law=[0.1, 0.5, 0.2, 0.9], identified=False, minimum_without=without)
    assert "the place of a minimum is not identified: " in line
    assert f"{said}; of those tried" in line


def test_learning_rates_tuned_for_another_version_are_named(tiny_run):
    result = json.loads((tiny_run / "eval.json").read_text("utf-8"))
    line = "the learning rates used were tuned for another version of this config"
    assert line not in facts_of(result | {"tuned": True})
    assert line in facts_of(result | {"tuned": False})


def test_students_of_a_curve_have_no_line_of_their_own(tiny_run):
    """Gaps and costs would repeat what the tables of savings say."""
    result = json.loads((tiny_run / "eval.json").read_text("utf-8"))
    main, second = [*result["students"]][:2]
    curve = {"curves": {"kind": {second: 1.0, main: 0.5}}}
    result["savings"] = {**curve, "labels": {second: 3, main: 1}, "answers": {second: 0, main: 0}}
    facts = facts_of(result)
    assert "different rows that students read: kind 1 to 3 labels" in facts
    assert not any(re.search(rf"\b{second}\b", fact) for fact in facts if "closes" in fact)
    assert not any(re.search(rf"\b{second}\b", fact) for fact in facts if "set to" in fact)


def test_students_of_right_traces_alone_say_how_many_those_were():
    def student(traces):
        return {"recipe": {"outputs": {"traces": traces}}}

    result = {
        "students": {"right": student("right"), "all": student("all")},
        "cost": {
            "outputs_by_student": {
                "right": {"rows": 5000, "kept": 4321},
                "all": {"rows": 5000, "kept": 5000},
            }
        },
    }
    assert traces_kept(result) == [
        "right learned from 4,321 of 5,000 traces, those with a right answer"
    ]
