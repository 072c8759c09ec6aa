"""Scaling laws."""

import numpy as np
import pytest

from measure.laws import Law, fit_law, scaling_laws


def test_students_that_pay_for_more_rows_are_no_study_of_rows(scaling_result):
    """They train for fewer steps, which would be confounded with the number of words."""
    result = scaling_result
    assert "rows" in scaling_laws(result)
    for entry in result["students"].values():
        entry["recipe"]["outputs"]["charged"] = True
    assert "rows" not in scaling_laws(result)


def test_a_law_is_recovered_from_its_points():
    x = np.geomspace(1e3, 1e6, 7)
    noise = np.exp(0.01 * np.random.default_rng(0).standard_normal(7))
    falling = fit_law(x, (40 * x**-0.5 + 0.1) * noise)
    assert (falling.a, falling.b, falling.c) == pytest.approx((40, 0.5, 0.1), rel=0.15)
    assert falling.d == 0
    assert falling.minimum_at is None
    sizes = x / 1e6
    law = Law(0.002, 1.0, 0.3, 0.8)
    turning = fit_law(sizes, law(sizes) * noise, has_minimum=True)
    assert turning.minimum_at == pytest.approx(law.minimum_at, rel=0.15)
    assert law(np.array([0.5, 1, 2]) * law.minimum_at).argmin() == 1
    assert fit_law(x[:3], x[:3]) is None  # three points fit any law
    assert fit_law(x[:4], x[:4], has_minimum=True) is None
