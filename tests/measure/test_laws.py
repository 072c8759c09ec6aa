"""Scaling laws."""

import numpy as np
import pytest

from measure import laws
from measure.laws import Law, fit_law, law_of, minimum_interval, scaling_laws
from measure.statistics import Estimate, joint_draws
from tests.helpers import drawn


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


X = np.array([0.02, 0.05, 0.1, 0.2, 0.4, 1.0])


def study(y, estimates=None):
    """A study of sizes with these divergences."""
    names = [f"size_{i}" for i in range(len(y))]
    students = {
        name: {"fidelity": {"kl_teacher_student": {"mean": float(value)}}}
        for name, value in zip(names, y, strict=True)
    }
    x = dict(zip(names, X[: len(y)].tolist(), strict=True))
    return law_of(x, {"students": students}, estimates, "size")


def test_a_minimum_is_identified_if_no_student_decides_where_it_is():
    law = Law(0.002, 1.2, 0.3, 0.9)
    assert X.min() < law.minimum_at < X.max()
    found = study(law(X))
    assert found["identified"]
    assert not study(law(X)[:5])["identified"]  # too few sizes to leave one out
    assert found["minimum_at"] == pytest.approx(law.minimum_at, rel=0.01)
    assert max(map(abs, found["residuals"].values())) < 0.01
    falling = 0.05 * X**-0.5
    moved = study(falling * np.array([1, 1, 1, 1, 1, 1.6]))  # only the last student says otherwise
    assert not moved["identified"]
    assert set(moved["minimum_without"]) == set(moved["x"])


def test_the_residual_of_a_student_is_its_distance_from_the_law():
    found = study(Law(0.002, 1.2, 0.3, 0.9)(X) * np.array([1, 1, 1.2, 1, 1, 1]))
    assert max(found["residuals"], key=found["residuals"].get) == "size_2"
    law = Law(*found["law"])
    assert found["residuals"]["size_2"] == pytest.approx(
        1.2 * Law(0.002, 1.2, 0.3, 0.9)(X[2]) / law(X[2]) - 1
    )


@pytest.mark.slow
def test_intervals_of_a_law_cover_the_truth_in_95_of_100_simulated_studies():
    law, generator, covered, runs = Law(0.002, 1.2, 0.3, 0.9), np.random.default_rng(0), 0, 40
    for _ in range(runs):
        row = 0.3 * generator.standard_normal(400)
        estimates = [drawn(generator, 5, 400, value, 0.003, row=0.1 * row) for value in law(X)]
        found = study([estimate.mean for estimate in estimates], estimates)
        low, high = found["minimum_ci95"]
        covered += low <= law.minimum_at <= high
    assert covered / runs >= 0.85  # 95 % of 40 studies, less two standard errors of the count


def test_joint_draws_vary_as_the_estimates_do():
    generator = np.random.default_rng(0)
    row = 0.3 * generator.standard_normal(300)
    estimates = [drawn(generator, 6, 300, level, 0.01, row=row) for level in (0.3, 0.6)]
    draws = joint_draws(estimates, 4000)
    for i, estimate in enumerate(estimates):
        assert draws[:, i].mean() == pytest.approx(estimate.mean, abs=0.002)
        assert draws[:, i].std() == pytest.approx(estimate.standard_error(), rel=0.1)
    difference = estimates[0] - estimates[1]
    assert (draws[:, 0] - draws[:, 1]).std() == pytest.approx(difference.standard_error(), rel=0.1)


def test_words_that_the_teacher_invented_are_no_part_of_a_study_of_words(scaling_result):
    found = scaling_laws(scaling_result)["rows"]["x"]
    prompts = [scaling_result["students"][name]["recipe"]["outputs"]["prompts"] for name in found]
    assert set(prompts) == {"train"}
    assert len(found) == 5


def test_a_bound_of_the_minimum_beyond_the_sizes_is_not_given():
    near, beyond, none = Law(0.002, 1.2, 0.3, 0.9), Law(2, 1.2, 0.3, 0.9), Law(0.002, 1.2, 0.3, 0)
    assert X.min() < near.minimum_at < X.max() < beyond.minimum_at
    assert none.minimum_at is None
    found = minimum_interval([near] * 99 + [none], X)
    assert found == pytest.approx([near.minimum_at] * 2)
    assert minimum_interval([near] * 90 + [none] * 10, X) == [pytest.approx(near.minimum_at), None]
    assert minimum_interval([beyond] * 100, X) == [None, None]


def test_a_law_of_a_whole_study_has_intervals_around_it():
    law, generator = Law(0.002, 1.2, 0.3, 0.9), np.random.default_rng(0)
    row = 0.03 * generator.standard_normal(200)
    estimates = [drawn(generator, 5, 200, value, 0.001, row=row) for value in law(X)]
    found = study([estimate.mean for estimate in estimates], estimates)
    for value, (low, high) in zip(found["law"], found["law_ci95"], strict=True):
        assert low < value < high
    low, high = found["minimum_ci95"]
    assert low < found["minimum_at"] < high
    assert found["identified"]


def test_a_minimum_whose_interval_leaves_the_sizes_is_not_identified(monkeypatch):
    monkeypatch.setattr(laws, "minimum_interval", lambda *_: [0.1, None])
    law, generator = Law(0.002, 1.2, 0.3, 0.9), np.random.default_rng(0)
    estimates = [drawn(generator, 5, 50, value, 0.001) for value in law(X)]
    found = study([estimate.mean for estimate in estimates], estimates)
    assert found["minimum_ci95"] == [0.1, None]
    assert not found["identified"]


def test_a_fit_that_starts_near_a_law_finds_the_same():
    law = Law(0.002, 1.2, 0.3, 0.9)
    found = fit_law(X, law(X), has_minimum=True, near=law)
    assert (found.a, found.b, found.c, found.d) == pytest.approx((0.002, 1.2, 0.3, 0.9), rel=1e-4)
    falling = Law(0.05, 0.5, 0.01, 0.0)
    found = fit_law(X, falling(X), near=falling)
    assert (found.a, found.b, found.c) == pytest.approx((0.05, 0.5, 0.01), rel=1e-3)


def test_joint_draws_of_models_with_common_seeds_vary_together():
    """The seeds that both have move both; the rest is their own."""
    generator = np.random.default_rng(0)
    deviation, rows = 0.02 * generator.standard_normal(6), np.zeros((6, 50))
    estimates = [Estimate(level + deviation, rows) for level in (0.3, 0.6)]
    draws = joint_draws(estimates, 2000)
    assert draws[:, 0].std() == pytest.approx(estimates[0].standard_error(), rel=0.1)
    assert (draws[:, 0] - draws[:, 1]).std() < 0.05 * draws[:, 0].std()


def test_the_interval_of_a_law_leaves_out_a_fortieth_on_both_sides(monkeypatch):
    at = Law(0.002, 1.2, 0.3, 0.9)
    fits = iter(range(201))

    def fit(x, y, has_minimum=False, near=None):
        return Law(float(next(fits)), at.b, at.c, at.d) if near else at

    monkeypatch.setattr(laws, "fit_law", fit)
    monkeypatch.setattr(laws, "LAW_DRAWS", 201)
    estimates = [Estimate(np.array([v, v, v]), np.zeros((3, 5))) for v in at(X)]
    assert study(at(X), estimates)["law_ci95"][0] == pytest.approx([5.0, 195.0])
