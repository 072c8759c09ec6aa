"""Figures of the report."""

import json
import re

import pytest

from measure.laws import Law
from measure.report.drawing import INK, SERIES, drawn, styles_of, subplots
from measure.report.figures import cost_bars, forest, pareto_front
from measure.report.studies import scaling
from measure.report.tables import models_in
from tests.helpers import ROOT


def test_the_pareto_front_is_what_nothing_cheaper_exceeds():
    points = [(1, 5), (2, 4), (2, 7), (3, 7), (4, 9), (1, 3)]
    assert pareto_front(points, 1) == [(1, 5), (2, 7), (4, 9)]
    assert pareto_front([(x, -y) for x, y in points], -1) == [(1, -5), (2, -7), (4, -9)]


@pytest.mark.parametrize("study", ["rows", "size"])
def test_a_study_is_drawn_with_all_its_students_and_its_law(study, scaling_result):
    found = scaling_result["laws"][study]
    svg = scaling(scaling_result, found, "how much", styles_of(list(models_in(scaling_result))))
    assert len(found["x"]) == {"rows": 5, "size": 7}[study]
    for text in (*found["x"], "how much", f"KL = {Law(*found['law'])}"):
        assert f">{text}<" in svg


def test_a_figure_follows_the_colours_of_the_page_and_repeats_no_id():
    figure, axes = subplots()
    axes.plot([0, 1], color=SERIES[2], label="a")
    axes.plot([1, 0], color=INK)
    svg = drawn(figure, 'a "label"')
    assert svg.startswith('<svg role="img" aria-label="a &quot;label&quot;"')
    assert "var(--series-2)" in svg
    assert "currentColor" in svg
    assert not re.search(r"#0[0-3]0[01]0\d", svg)
    ids = re.findall(r'\bid="([^"]*)"', svg)
    assert len(ids) == len(set(ids))
    other = drawn(subplots()[0], "another")
    assert not set(ids) & set(re.findall(r'\bid="([^"]*)"', other))


def test_models_differ_in_colour_and_marker():
    styles = styles_of(["teacher", *"abcdefghijkl"])
    looks = [(style["color"], style["marker"]) for style in styles.values()]
    assert len(set(looks)) == 13


def test_the_forest_has_a_plot_for_every_metric_and_a_row_for_every_claim_of_a_student():
    result = json.loads((ROOT / "results" / "quickstart.json").read_text(encoding="utf-8"))
    plots = forest(result)
    assert list(plots) == ["word errors", "agreement with teacher", "KL to teacher", "ECE"]
    claims = [v for v in result["verdicts"] if v["metric"] == "word_error_rate"]
    rows = [v["claim"].replace(" beats ", " against ") for v in claims]
    assert [row for row in rows if f">{row}<" in plots["word errors"]] == rows[:-1]
    assert rows[-1].startswith("shuffled ")  # a control, far from the students


def test_bars_of_cost_are_labelled_with_the_share_of_the_teacher():
    result = json.loads((ROOT / "results" / "quickstart.json").read_text(encoding="utf-8"))
    result["cost"]["fraction_of_teacher_by_student"]["hidden"]["flops"] = 0.42
    svg = cost_bars(result, "flops")
    assert svg.count(">42 %<") == 1
    assert svg.count(">15 %<") == len(models_in(result)) - 2
