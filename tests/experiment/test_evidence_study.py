"""The study of evidence, from runs to its claims and tables."""

import json
from collections import Counter

import numpy as np
import pytest

from experiment import evidence_study
from experiment.evidence_study import (
    NEEDED,
    SOLD,
    SUBTRACTED,
    Trial,
    bought_by,
    claims_of,
    parts_of,
    verdict,
)
from experiment.plan import Plan
from experiment.run import Run
from measure.rates import Rate
from measure.report.counted import tables_of_study
from models.rows import Rows
from tests.helpers import train_tiny

RECIPES = """recipes={
    plain: {access: text, sequences: teacher, objective: cross_entropy,
        outputs: {temperature: 1, transfer_rows: 150}, student: {budget_fraction: 0.8, seeds: 1}},
    marked: {access: text, sequences: teacher, objective: cross_entropy,
        outputs: {temperature: 1, transfer_rows: 150, watermark: 6},
        student: {budget_fraction: 0.8, seeds: 1}},
    fifth: {access: text, sequences: teacher, objective: cross_entropy,
        outputs: {temperature: 1, transfer_rows: 150, watermark: 6, watermark_share: 0.5},
        student: {budget_fraction: 0.8, seeds: 1}},
    first: {access: text, sequences: teacher, objective: cross_entropy,
        outputs: {temperature: 1, transfer_rows: 150, watermark: 6},
        student: {budget_fraction: 0.7, seeds: 1}},
    cleaned: {access: none, objective: cross_entropy, teachers: [first],
        student: {initial_layers: [1], seeds: 1}},
    innocent: {access: none, objective: cross_entropy, student: {budget_fraction: 0.8}}}"""
RUN = (" ".join(RECIPES.split()), "controls=[]", "verdicts=[]")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    for number, seeds in enumerate(("[0,1,2,3]", "[4,5,6]", "[7,8]")):
        key = f"watermark_key: {1288833545 + 2 * number}, canaries: 0.2"
        api = f"teacher.api={{permission: its owner, {key}}}"
        own = (f"name=r{number}", f"seeds={seeds}", f"teacher.seed={10 * number}", api)
        assert train_tiny(folder, *RUN, *own) == 0
    return [folder / f"r{number}" for number in range(3)]


@pytest.fixture(scope="module")
def study(runs, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evidence_study, "TOKENS", 1500)
        patch.setattr(evidence_study, "LENGTHS", (250, 500, 1_000, 5_600))
        patch.setattr(evidence_study, "POWER", {("marked", 500): 0.5, ("fifth", 1_000): 0.5})
        patch.setattr(evidence_study, "SEQUENCES", 10)
        out = tmp_path_factory.mktemp("out") / "results" / "provenance.json"
        out.parent.mkdir()
        (out.parent.parent / "docs").mkdir()
        page = out.parent.parent / "docs" / "page.md"
        page.write_text("<!-- study/provenance.json -->\n<!-- end -->\n", encoding="utf-8")
        assert evidence_study.main([*map(str, runs), "--out", str(out)]) == 0
    return json.loads(out.read_text("utf-8")), page.read_text("utf-8")


def test_marked_students_show_it_and_innocent_ones_do_not(study):
    marks = study[0]["marks"]
    assert [len(one["z"]) for one in marks.values()] == [3, 3, 3, 3, 3, 9, 3]
    assert min(marks["marked"]["z"]) > 8
    assert np.mean(marks["marked"]["z"]) > np.mean(marks["fifth"]["z"]) > 2
    assert np.mean(marks["cleaned"]["z"]) < np.mean(marks["first"]["z"])
    assert np.mean(marks[SUBTRACTED]["z"]) < np.mean(marks["marked"]["z"]) / 2
    assert max(map(abs, marks["innocent"]["z"] + marks["plain"]["z"])) < 4
    assert marks["marked"]["power"]["500"]["of"] == 6  # two texts of each student
    assert marks["marked"]["power"]["5600"]["of"] == 0
    assert 0.8 < study[0]["null"]["spread"] < 1.2
    assert study[0]["null"]["texts"] == 9 * evidence_study.KEYS
    assert study[0]["library"]["spread"] > study[0]["null"]["spread"]


def test_every_student_is_examined_with_and_without_its_teacher_among_the_candidates(study):
    for kinds in study[0]["teachers"].values():
        assert sum(kinds["innocent"].values()) == 9
        assert kinds["innocent"].get("right", 0) == 0
        for name in ("plain", "marked", "fifth", "cleaned"):
            assert sum(kinds[name].values()) == 3
            assert kinds[f"{name}, unlisted"].get("right", 0) == 0
    accounts = study[0]["accounts"]
    assert accounts["sampled answers"]["plain"] == {"right": 3}
    for recipes in accounts.values():
        assert recipes["innocent"] == {"nobody": 9}
        for name in ("plain", "marked", "fifth", "first"):
            assert recipes[name].get("wrong", 0) == 0


def test_what_was_found_is_written_into_the_pages_that_show_it(study):
    found, page = study
    for title, headings, rows in tables_of_study(found):
        assert f"{title}:\n" in page
        assert all(len(row) == len(headings) for row in rows)
    for one in found["claims"]:
        assert f"- {one['result']}: {one['claim']}" in page
    assert len(found["claims"]) == 7


def test_runs_that_cannot_be_compared_are_refused(runs, tiny_run, capsys):
    assert evidence_study.main([*map(str, runs[:2])]) == 2
    assert "2 different teachers in 2 runs, 3 are needed" in capsys.readouterr().err
    assert evidence_study.main([str(tiny_run), *map(str, runs[:2])]) == 2
    assert "is no run of configs/provenance.yaml" in capsys.readouterr().err


def test_a_student_that_goes_on_from_a_taught_one_is_not_innocent(runs):
    trial = Trial(Run.finished(runs[0]), None)
    assert trial.taught("cleaned")
    assert not trial.taught("innocent")
    assert len(trial.innocent) == 4


def test_parts_of_a_text_are_disjoint_and_long_enough():
    rows = Rows.build([*range(5)], [[1]] * 5, [[2] * n for n in (3, 4, 1, 1, 9)])
    parts = [len(part) for part in parts_of(rows, 5)]
    assert parts == [2, 3]
    assert [*parts_of(rows, 100)] == []


def test_whom_closeness_accuses():
    innocent = [{"a": 0.1 * n, "b": 0.1 * (n % 3)} for n in range(9)]
    assert verdict({"a": 90.0, "b": 0.0}, innocent, "a") == "right"
    assert verdict({"a": 90.0, "b": 0.0}, innocent, "b") == "wrong"
    third = [one | {"c": 0.05 * n} for n, one in enumerate(innocent)]
    assert verdict({"a": 90.0, "b": 90.0, "c": 0.0}, third, "a") == "wrong"
    assert verdict({"a": 0.3, "b": 0.1}, innocent, "a") == "nobody"


def test_claims_follow_from_what_was_counted():
    null = np.random.default_rng(0).normal(size=4000)
    power = {name: {n: Rate(27, 27) for n in (1_000, 5_600)} for name in NEEDED}
    kinds = {name: Counter(right=9) for name in SOLD} | {"innocent": Counter(nobody=16)}
    kinds |= {f"{name}, unlisted": Counter(nobody=9) for name in SOLD}

    def results(null=null, power=power, kinds=kinds):
        found = claims_of({"null": null, "power": power}, {"weights": kinds})
        return [one["result"] for one in found]

    assert results() == ["supported"] * 7
    assert results(null=null * 1.3)[:2] == ["refuted", "refuted"]
    low = power | {"marked": {1_000: Rate(20, 27)}}
    assert results(power=low)[2] == "refuted"
    assert results(kinds=kinds | {"innocent": Counter(nobody=15, wrong=1)})[4] == "refuted"
    assert results(kinds=kinds | {"fifth": Counter(right=8, nobody=1)})[5] == "refuted"
    assert results(kinds=kinds | {"plain, unlisted": Counter(wrong=1)})[6] == "refuted"


def test_a_student_of_a_student_has_learned_what_the_first_one_bought(runs):
    plan = Plan(Run.finished(runs[0]).config())
    (marked,) = bought_by(plan, "marked")
    assert "watermark" in marked
    assert bought_by(plan, "cleaned") == {marked}
    assert bought_by(plan, "innocent") == set()
