"""The table METRICS: how faithful a model is to its teacher, for every task.

Metrics of one task, such as its grades, are in the task (`metrics`, `agreement`). To add a metric,
add an entry: with `positions`, a function of the distributions of teacher and student at M
positions; otherwise a ratio of columns of the evaluation.
"""

from typing import Any

from measure.fidelity import (
    calibration,
    kl_student_teacher,
    kl_teacher_student,
    nll_gap,
    top1_agreement,
)
from measure.statistics import calibrated_error, expected_calibration_error
from tasks import TASKS
from tasks.task import Metric, Task

METRICS: dict[str, Metric] = {
    "sequence_agreement": Metric(
        "agreement with teacher", "%", False, "same", needs_teacher=True,
        meaning="answers that are exactly the teacher's",
    ),
    "agreement_on_teacher_errors": Metric(
        "teacher errors copied", "%", False, "copied", "errors", needs_teacher=True,
        meaning="of the teacher's wrong answers, those that a model gives too",
    ),
    "kl_teacher_student": Metric(
        "KL to teacher", "nats", True, positions=kl_teacher_student, needs_teacher=True,
        meaning="how far a model's distribution over the next token is from the teacher's: "
        "KL(teacher || model), mean over the tokens of the right answers; 0 if they are equal",
    ),
    "kl_student_teacher": Metric(
        "KL from teacher", "nats", True, positions=kl_student_teacher, needs_teacher=True,
        meaning="the same with the two exchanged: KL(model || teacher)",
    ),
    "top1_agreement": Metric(
        "top-1 agreement", "%", False, positions=top1_agreement, needs_teacher=True,
        meaning="tokens at which teacher and model find the same one most likely",
    ),
    "nll_gap": Metric(
        "NLL gap", "nats", True, positions=nll_gap, needs_teacher=True,
        meaning="a model's negative log-likelihood of the right token less the teacher's",
    ),
    "ece": Metric(
        "ECE", "%", True, positions=calibration, statistic=expected_calibration_error,
        meaning="expected calibration error: how far a model's confidence in its most likely token "
        "is from how often it is right, mean over bins of confidence",
    ),
    "ece_if_calibrated": Metric(
        "ECE if calibrated", "%", True, positions=calibration, statistic=calibrated_error,
        meaning="the ECE that a perfectly calibrated model would have by chance",
    ),
}  # fmt: skip

# Metrics that figures, laws and the self-check read.
AGREEMENT, DIVERGENCE, REVERSE = "sequence_agreement", "kl_teacher_student", "kl_student_teacher"
TOP1, CALIBRATION = "top1_agreement", "ece"


def metrics_of(task: type[Task] | Task) -> dict[str, Metric]:
    """Every metric of a task's models: the task's metrics, agreement of answers, fidelity."""
    return {**task.metrics, **task.agreement, **METRICS}


def metrics_in(result: dict[str, Any]) -> dict[str, Metric]:
    """The metrics of a result's task."""
    return metrics_of(TASKS[result["config"]["task"]["name"]])
