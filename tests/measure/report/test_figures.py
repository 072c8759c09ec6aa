"""Figures of the report."""

import base64

import pytest

from measure.laws import Law
from measure.report.figures import pareto_front, scaling
from measure.report.tables import models_in


def test_the_pareto_front_is_what_nothing_cheaper_exceeds():
    points = [(1, 5), (2, 4), (2, 7), (3, 7), (4, 9), (1, 3)]
    assert pareto_front(points, 1) == [(1, 5), (2, 7), (4, 9)]
    assert pareto_front([(x, -y) for x, y in points], -1) == [(1, -5), (2, -7), (4, -9)]


@pytest.mark.parametrize("study", ["rows", "size"])
def test_a_study_is_drawn_with_all_its_students_and_its_law(study, scaling_result):
    found = scaling_result["laws"][study]
    colours = dict.fromkeys(models_in(scaling_result), "#000")
    drawn = scaling(scaling_result, found, "how much", colours)
    svg = base64.b64decode(drawn.partition(",")[2]).decode()
    assert len(found["x"]) >= 7
    for text in (*found["x"], "how much", f"KL = {Law(*found['law'])}"):
        assert f">{text}<" in svg
