"""On-policy: the student writes, the teacher scores."""

import numpy as np
import pytest
import torch

import train
from configs.schema import Model, Recipe
from experiment.cost import CountedForward
from experiment.run import Run
from models.language import build_model, initialise, load_model
from models.rows import Rows, collate
from student.on_policy import OnPolicy, write
from tasks.pronounce import Pronounce
from tests.helpers import METHODS, MODEL, TINY


def test_a_student_writes_in_exactly_the_steps_of_its_schedule(tmp_path):
    task = Pronounce(limit=300)
    recipe = Recipe(access="logits", student={"on_policy": {"start": 0, "end": 1}})
    policy = OnPolicy(task.rows("train"), None, None, None, recipe, 0, 8, 20, 2, 72)
    due = [policy.due(step, step / 2000) for step in range(2000)]
    assert sum(due[:200]) < 40 < 160 < sum(due[-200:])
    assert sum(due) == pytest.approx(1000, abs=70)
    assert due == [policy.due(step, step / 2000) for step in range(2000)]


def test_on_policy_rows_are_the_students_own_with_the_teachers_live_signal(tiny_run):
    task, teacher = Pronounce(limit=600), load_model(tiny_run / "teacher")
    student = load_model(tiny_run / "students" / "distilled" / "seed-0")
    recipe = Recipe(access="logits", sequences="student", student={"temperature": 0})
    rows = task.rows("train")
    counted = CountedForward(teacher)
    policy = OnPolicy(rows, counted, None, CountedForward, recipe, 0, 16, 20, 2, 72)
    written = policy.written(student, step=3)
    again = policy.written(student, step=3)
    assert written.rows.digest() == again.rows.digest()
    assert written.rows.digest() != policy.written(student, step=4).rows.digest()
    assert written.flops == pytest.approx(again.flops)
    for i in range(4):  # greedy here, so that it can be checked without a cache
        prompt = torch.from_numpy(written.rows.prompt(i).astype(np.int64))
        answer = written.rows.completion(i).tolist()
        seen = prompt
        for token in answer:
            with torch.no_grad():
                assert int(student(seen[None]).logits[0, -1].argmax()) == token
            seen = torch.cat([seen, torch.tensor([token])])
    part = collate(written.rows, np.array([5, 2, 9]), pad=0)
    with torch.no_grad():
        live = torch.log_softmax(teacher(part.input_ids).logits[part.counted], -1)
    signal = written.signal(part)
    torch.testing.assert_close(signal.log_probs, live, atol=1e-4, rtol=1e-4)
    assert not signal.log_probs.requires_grad


def policy_with(rewards, group, batch_rows=8):
    recipe = Recipe(
        access="none", sequences="student", objective="policy_gradient", student={"group": group}
    )
    rows = Rows.build(list(range(20)), [[1, 5]] * 20, [[6 + i % 3, 2] for i in range(20)])
    return OnPolicy(rows, None, rewards, None, recipe, 0, batch_rows, 20, 2, 72)


def test_a_batch_is_as_many_answers_with_groups_as_without():
    rewarded = policy_with(lambda rows: np.zeros(len(rows)), group=4)
    assert len(rewarded.order(0)) == 2  # prompts, each answered four times
    assert len(policy_with(None, group=4).order(0)) == 8


def test_groups_of_equal_rewards_are_dropped_and_of_a_whole_batch_all_but_one():
    def kept(*rewards):
        policy = policy_with(lambda rows: np.array(rewards, float), group=2)
        rows = policy.rows.take(np.repeat([5, 7, 9], 2))
        found, signal = policy.rewarded(rows)
        return found.ids.tolist(), signal.advantages.tolist()

    assert kept(1, 1, 0, 1, 0, 0) == ([7, 7], [-1, -1, 1, 1])  # two tokens each
    assert kept(1, 1, 0, 1, 1, 0)[0] == [7, 7, 9, 9]
    assert kept(1, 1, 0, 0, 1, 1) == ([5, 5], [0, 0, 0, 0])


def test_interrupted_on_policy_training_resumes_exactly(methods_run, tmp_path, monkeypatch):
    """The text is a function of the step, and its cost is in the checkpoint."""
    import experiment.log

    overrides = [*METHODS, "checkpoint_seconds=0"]
    noted = []

    class Stop(Exception):
        pass

    note = experiment.log.TrainingLog.record

    def interrupt(self, step, *rest):
        if self.stage == "students/mixed/seed-0" and step == 27:
            raise Stop
        noted.append(self.stage)
        return note(self, step, *rest)

    monkeypatch.setattr(experiment.log.TrainingLog, "record", interrupt)
    with pytest.raises(Stop):
        train.main([TINY, *overrides, "--runs", str(tmp_path)])
    monkeypatch.setattr(experiment.log.TrainingLog, "record", note)
    assert train.main([TINY, *overrides, "--runs", str(tmp_path)]) == 0
    found = Run.finished(tmp_path / "methods").manifest["stages"]
    for stage, made in methods_run.manifest["stages"].items():
        assert found[stage]["sha256"] == made["sha256"], stage


def test_a_step_is_charged_for_its_own_writing_and_scoring():
    """Not for what the teacher computed before: the same step costs the same again."""
    task = Pronounce(limit=300)
    settings = Model(**MODEL)
    teacher = CountedForward(initialise(build_model(settings, task), 0))
    student = initialise(build_model(settings, task), 1)
    recipe = Recipe(access="logits", sequences="student")
    policy = OnPolicy(
        task.rows("train"), teacher, None, CountedForward, recipe, 0, 16, 20, task.end,
        task.vocabulary,
    )  # fmt: skip
    first, again = policy.written(student, step=3), policy.written(student, step=3)
    writer = CountedForward(student)
    write(writer, policy.rows.take(policy.order(3)), policy, torch.Generator().manual_seed(0))
    scored = CountedForward(teacher.model)
    batch = collate(first.rows, np.arange(16), pad=task.end)
    scored(batch.input_ids, use_cache=False)
    assert first.flops == again.flops
    assert scored.flops < first.flops < 3 * (scored.flops + writer.flops)
