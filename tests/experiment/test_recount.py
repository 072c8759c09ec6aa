"""The ledger, counted from outside: every matrix product of a run is charged to its stage."""

import pytest
from torch.utils.flop_counter import FlopCounterMode

import experiment.log
import train
from experiment.cost import TrainingFlops
from experiment.run import Run
from tests.helpers import METHODS, train_tiny

KINDS = (
    "recipes={plain: {access: logits}, "
    "states: {access: hidden, outputs: {layers: [1]}, "
    "objective: {forward_kl: 0.5, hidden_mse: {start: 0.5, end: 0, until: 0.5}}}, "
    "related: {access: hidden, outputs: {layers: [1]}, sequences: teacher, "
    "objective: {forward_kl: 0.5, value_relation_kl: 0.5}}, "
    "own: {access: logits, sequences: student, objective: reverse_kl}, "
    "mixed: {access: top_k, student: {on_policy: 0.5}}, "
    "averaged: {access: logits, teachers: [teacher, second_teacher]}, "
    "written: {access: text, sequences: teacher, objective: cross_entropy, "
    "outputs: {prompts: extended, transfer_rows: 260}}}"
)


LESS = ("name=methods", "compare=null", "task.limit=250", "teacher.epochs=4")


@pytest.fixture(scope="module")
def recount(tmp_path_factory):
    """(a run, {stage: FLOPs that torch counted while it was made})."""
    counted: dict[str, float] = {}
    count_row, fit, make_outputs = TrainingFlops.of_row, train.fit, train.make_outputs
    open_counters: list[FlopCounterMode] = []
    apart = [0.0]  # passes that only count, and are no part of a training

    def of_row(self, length):
        before = [counter.get_total_flops() for counter in open_counters]
        found = count_row(self, length)
        if open_counters:
            apart[0] += open_counters[0].get_total_flops() - before[0]
        return found

    def around(function, stage_of):
        def wrapped(*arguments, **options):
            apart[0] = 0.0
            with FlopCounterMode(display=False) as counter:
                open_counters.append(counter)
                result = function(*arguments, **options)
                open_counters.pop()
            counted[stage_of(arguments)] = counter.get_total_flops() - apart[0]
            return result

        return wrapped

    runs = tmp_path_factory.mktemp("recount")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingFlops, "of_row", of_row)
        patch.setattr(experiment.log, "validation_nll", lambda *_: 0.0)  # not charged: see README
        patch.setattr(train, "fit", around(fit, lambda arguments: arguments[1]))
        stage_of_folder = lambda arguments: f"outputs/{arguments[0].name}"  # noqa: E731
        patch.setattr(train, "make_outputs", around(make_outputs, stage_of_folder))
        assert train_tiny(runs, *METHODS[:-2], KINDS, *LESS) == 0
    return Run.finished(runs / "methods"), counted


def test_every_stage_is_charged_for_all_that_it_computes(recount):
    run, counted = recount
    assert set(counted) == set(run.manifest["stages"])
    for stage, flops in counted.items():
        assert run.cost_of(stage)["flops"] == pytest.approx(flops, rel=1e-9), stage


def test_writing_and_scoring_are_no_small_part_of_an_on_policy_student(recount):
    """So that the test above would notice if they were free."""
    run, _ = recount
    own, plain = (run.cost_of(f"students/{name}/seed-0") for name in ("own", "plain"))
    assert own["flops"] / own["steps"] > 1.3 * plain["flops"] / plain["steps"]
