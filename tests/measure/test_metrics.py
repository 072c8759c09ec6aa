"""The metrics of every task: which direction is better, and which models they apply to."""

from measure.metrics import metrics_of
from tasks import TASKS

METRICS = [(name, metric) for task in TASKS.values() for name, metric in metrics_of(task).items()]
BY_STEPS = {f"accuracy_{steps}" for steps in (*range(1, 9), "4_5")}


def names(flag):
    """The metrics that have a flag in every task that has the metric."""
    marked, others = (
        {name for name, metric in METRICS if bool(getattr(metric, flag)) == wanted}
        for wanted in (True, False)
    )
    assert not marked & others
    return marked


def test_errors_distances_and_losses_are_better_when_lower_and_nothing_else():
    """A verdict takes its sign from here."""
    assert names("lower_is_better") == {
        "word_error_rate", "phoneme_error_rate", "error_rate", "bits_per_byte",
        "kl_teacher_student", "kl_student_teacher", "nll_gap", "ece", "ece_if_calibrated",
        "far_word_error_rate",
    }  # fmt: skip


def test_what_compares_a_model_with_its_teacher_needs_one():
    assert names("needs_teacher") == {
        "sequence_agreement", "agreement_on_teacher_errors", "kl_teacher_student",
        "kl_student_teacher", "top1_agreement", "nll_gap", "answer_agreement", "step_agreement",
    }  # fmt: skip


def test_models_that_write_no_reasoning_are_judged_by_their_final_answers():
    assert names("final_answer") == {
        "accuracy", *BY_STEPS, "answer_agreement",
    }  # fmt: skip
