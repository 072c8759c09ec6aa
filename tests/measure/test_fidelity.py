"""Fidelity against hand values."""

import numpy as np
import pytest
import torch

from measure.fidelity import ECE_BINS, Expectations, calibration, entropy, nll, sum_by_row
from measure.metrics import METRICS
from measure.statistics import expected_calibration_error


def fidelity(teacher, student, targets):
    """Every metric over positions that is one number per position."""
    at = Expectations(teacher, student, targets)
    return {n: m.positions(at) for n, m in METRICS.items() if m.positions and not m.statistic}


def test_fidelity_hand_values():
    p, q = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.25, 0.5]])
    found = fidelity(p.log(), q.log(), torch.tensor([0]))
    assert found["kl_teacher_student"].item() == pytest.approx(0.25 * np.log(2))
    assert found["nll_gap"].item() == pytest.approx(np.log(2))  # -ln .25 + ln .5
    assert found["top1_agreement"].item() == 0


def test_entropy_and_likelihood_are_the_students_in_nats():
    student = torch.tensor([[0.25, 0.25, 0.5], [1.0, 0.0, 0.0]])
    at = Expectations(student.flip(1).log(), (student + 1e-12).log(), torch.tensor([0, 0]))
    assert entropy(at).tolist() == pytest.approx([1.5 * np.log(2), 0], abs=1e-6)
    assert nll(at).tolist() == pytest.approx([np.log(4), 0], abs=1e-6)


def test_a_model_compared_with_itself_is_perfect(generator):
    logits = torch.randn(50, 9, generator=generator)
    found = fidelity(logits, logits, torch.arange(50) % 9)
    assert found["top1_agreement"].min() == 1
    for name in ("kl_teacher_student", "kl_student_teacher", "nll_gap"):
        assert found[name].abs().max() == 0


def test_calibration_error_hand_value():
    # four positions at confidence 0.75, three of them right: calibrated; one at 0.9, wrong
    sure, surer = [0.75, 0.25, 0.0], [0.9, 0.05, 0.05]
    logits = (torch.tensor([sure] * 4 + [surer]) + 1e-12).log()
    columns = calibration(Expectations(logits, logits, torch.tensor([0, 0, 0, 1, 1])))
    assert columns.shape == (5, 3 * ECE_BINS)
    assert expected_calibration_error(columns.sum(0).numpy()) == pytest.approx(0.9 / 5)


def test_sums_by_row():
    values = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert sum_by_row(values, [1, 0, 3]).tolist() == [1.0, 0.0, 9.0]
