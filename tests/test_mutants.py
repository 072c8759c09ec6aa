"""The bugs that distillation code has had, planted one by one: the suite must go red.

Each is known from public code or threads. `old` is a piece of this project, `new` the same with
the bug; the tests named must fail.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PARTS = (
    "configs", "models", "tasks", "teacher", "student", "measure", "experiment", "tests", "results",
)  # fmt: skip
FILES = ("train.py", "eval.py", "pyproject.toml", "README.md", "constraints.txt")

# bug: (file, old, new, tests that must fail)
MUTANTS = {
    "KL of the teacher with itself": (
        "student/objectives.py",
        "return temperature**2 * kl(teacher, student)\n\n\ndef reverse_kl",
        "return temperature**2 * kl(teacher, teacher)\n\n\ndef reverse_kl",
        "student/test_objectives.py::test_hand_values",
    ),
    "a KL averaged over classes too": (
        "student/objectives.py",
        "return (a.exp() * (a - b)).sum(-1)",
        "return (a.exp() * (a - b)).mean(-1)",
        "student/test_objectives.py::test_hand_values",
    ),
    "batchmean: divided by rows, not by tokens": (
        "student/loss.py",
        "* batch.weights.to(model.device)).sum() / total_weight",
        "* batch.weights.to(model.device)).sum() / len(indices)",
        "test_train.py::test_the_first_loss_is_the_mean_per_counted_token",
    ),
    "missing T^2": (
        "student/objectives.py",
        "return temperature**2 * kl(teacher, student)\n\n\ndef reverse_kl",
        "return kl(teacher, student)\n\n\ndef reverse_kl",
        "student/test_objectives.py::test_the_gradient_keeps_its_scale_as_temperature_rises",
    ),
    "a forward KL that is a cross-entropy": (
        "student/objectives.py",
        "return (a.exp() * (a - b)).sum(-1)",
        "return -(a.exp() * b).sum(-1)",
        "student/test_objectives.py::test_zero_loss_and_zero_gradient_when_student_equals_teacher",
    ),
    "loss divided by the token count twice": (
        "student/loss.py",
        "* batch.weights.to(model.device)).sum() / total_weight",
        "* batch.weights.to(model.device)).sum() / total_weight / total_weight",
        "test_train.py::test_the_first_loss_is_the_mean_per_counted_token",
    ),
    "gradients scaled by 1 / tokens after a mean": (
        "train.py",
        "        norm = accelerator.clip_grad_norm_(",
        "        for p in model.parameters():\n"
        "            p.grad = None if p.grad is None else p.grad / normalizer[0]\n"
        "        norm = accelerator.clip_grad_norm_(",
        "test_train.py::test_the_logged_norm_is_that_of_the_mean_loss",
    ),
    "accumulation with the mean of means": (
        "train.py",
        "part_loss = loss(model, step_data, part, normalizer, progress)",
        "part_loss = loss(\n"
        "                model, step_data, part, loss.normalizer(step_data.rows, part), progress\n"
        "            ) / training.accumulation",
        "test_train.py::test_the_loss_does_not_depend_on_accumulation",
    ),
    "stored outputs read by position": (
        "teacher/shards.py",
        "rows = self.columns[column], self.source[batch.indices]",
        "rows = self.columns[column], np.arange(len(batch.indices))",
        "teacher/test_outputs.py::test_stored_outputs_equal_live_ones_whatever_the_order_of_the_rows",
    ),
    "off by one between logits and labels": (
        "models/rows.py",
        "place >= rows.prompt_lengths[indices][:, None] - 1",
        "place >= rows.prompt_lengths[indices][:, None]",
        "models/test_rows.py::test_counted_positions_predict_the_completion_and_nothing_else",
    ),
    "logits and labels at the same place": (
        "models/rows.py",
        "targets = np.roll(input_ids, -1, axis=1)[counted]",
        "targets = input_ids[counted]",
        "models/test_rows.py::test_counted_positions_predict_the_completion_and_nothing_else",
    ),
    "EOS left out": (
        "models/rows.py",
        "positions = place < lengths[:, None] - 1",
        "positions = place < lengths[:, None] - 2",
        "models/test_rows.py::test_eos_is_supervised_even_where_it_is_the_padding_token",
    ),
    "padding in the loss": (
        "models/rows.py",
        "positions = place < lengths[:, None] - 1",
        "positions = place < lengths.max() - 1",
        "models/test_rows.py::test_counted_positions_predict_the_completion_and_nothing_else",
    ),
    "prompt tokens in the loss": (
        "models/rows.py",
        "answering = place >= rows.prompt_lengths[indices][:, None] - 1",
        "answering = place >= 0",
        "models/test_rows.py::test_counted_positions_predict_the_completion_and_nothing_else",
    ),
    "EOS masked where it is the padding": (
        "models/rows.py",
        "counted = positions & (answering | (prompt_weight > 0))",
        "counted = positions & (answering | (prompt_weight > 0))\n"
        "    counted &= np.roll(input_ids, -1, axis=1) != pad",
        "models/test_rows.py::test_eos_is_supervised_even_where_it_is_the_padding_token",
    ),
    "a student that is scored with gradients of its teacher": (
        "student/on_policy.py",
        "with torch.no_grad():\n            ids",
        "if True:\n            ids",
        "student/test_on_policy.py::test_on_policy_rows_are_the_students_own_with_the_teachers_live_signal",
    ),
    "the learning rate restarted on resume": (
        "experiment/training_state.py",
        "return self.progress * self.steps if self.max_flops else self.step",
        'resumed = bool(self.watch.before["seconds"])\n        return self.step * (not resumed)',
        "test_train.py::test_an_interrupted_training_resumes_with_the_next_batch",
    ),
    "randomness restarted on resume": (
        "train.py",
        "seed_everything(seed_of_step(seed, step), device)",
        "resumed = bool(state.watch.before['seconds'])\n"
        "        seed_everything(seed_of_step(seed, step - 5 * resumed), device)",
        "test_train.py::test_an_interrupted_training_resumes_with_the_next_batch",
    ),
    "data skipped on resume": (
        "experiment/checkpoints.py",
        "    return meta\n",
        '    return {**meta, "step": meta["step"] + 1}\n',
        "test_train.py::test_an_interrupted_training_resumes_with_the_next_batch",
    ),
    "top-k without the tail": (
        "teacher/signal.py",
        "return rest.clamp_min(LOG_ZERO)",
        "return torch.full_like(rest, LOG_ZERO)",
        "student/test_objectives.py::test_top_k_with_a_tail_is_a_true_divergence_below_the_full_one",
    ),
    "a teacher in training mode": (
        "models/language.py",
        "return unmapped(model).eval()",
        "return unmapped(model).train()",
        "test_train.py::test_a_loaded_teacher_is_not_in_training_mode_and_keeps_no_gradients",
    ),
    "a teacher with gradients": (
        "teacher/source.py",
        "with torch.no_grad():\n                ids",
        "if True:\n                ids",
        "test_train.py::test_a_loaded_teacher_is_not_in_training_mode_and_keeps_no_gradients",
    ),
    "a silent temperature": (
        "models/generate.py",
        "torch.softmax(logits[sampled] / temp, dim=-1)",
        "torch.softmax(logits[sampled] / temp / 0.8, dim=-1)",
        "teacher/test_outputs.py::test_sampling_follows_the_models_own_distribution",
    ),
    "a silent top-p": (
        "models/generate.py",
        "probabilities = torch.softmax(logits[sampled] / temp, dim=-1)",
        "probabilities = torch.softmax(logits[sampled] / temp, dim=-1)\n"
        "                probabilities = probabilities * (probabilities > 0.05)",
        "teacher/test_outputs.py::test_sampling_follows_the_models_own_distribution",
    ),
    "vocabularies cut to the same width": (
        "models/vocabulary.py",
        "return min((i for i in a.keys() | b.keys() if a.get(i) != b.get(i)), default=None)",
        "return None if len(a) == len(b) else 0",
        "models/test_vocabulary.py::test_ids_that_mean_other_tokens_are_rejected",
    ),
    "the teacher's text tokenised again": (
        "teacher/source.py",
        "np.concatenate([rows.prompt(i), tokens]),",
        "np.concatenate([rows.prompt(i), teacher_task.tokenizer("
        'teacher_task.render(tokens.tolist()))["input_ids"]]),',
        "teacher/test_outputs.py::test_text_reveals_the_greedy_answers_and_nothing_more",
    ),
    "a weight that means the other term": (
        "student/recipe.py",
        "value_at(recipe.objective[name], progress) * loss",
        "(1 - value_at(recipe.objective[name], progress)) * loss",
        "student/test_objectives.py::test_a_mix_is_the_weighted_sum_of_its_terms",
    ),
    "a gain that is a doubled loss scale": (
        "experiment/rules.py",
        "if abs(total - 1) > 1e-6:",
        "if abs(total - 1) > 10:",
        "experiment/test_rules.py::test_a_config_that_cannot_work_is_rejected_in_one_line",
    ),
    "chosen on the held-out words": (
        "experiment/experiment.py",
        'task.evaluation_rows("validation")',
        'task.evaluation_rows("heldout")',
        "test_train.py::test_training_never_sees_the_held_out_words",
    ),
    "a baseline with less compute than the student": (
        "experiment/budget.py",
        "    if steps < 1:\n",
        '    steps = steps // 2 if name == "baseline" else steps\n    if steps < 1:\n',
        "experiment/test_budget.py::test_every_student_and_control_spends_the_budget_and_no_more",
    ),
    "one seed that passes for several": (
        "measure/verdicts.py",
        "result = decided if difference.seeds > 1 else ONE_RUN",
        "result = decided",
        "measure/test_verdicts.py::test_one_seed_is_never_a_verdict",
    ),
    "a validation loss that changes with what was trained": (
        "experiment/log.py",
        'line["validation_nll"] = validation_nll(model, self.task, self.validation)',
        'line["validation_nll"] = loss',
        "experiment/test_log.py::test_the_validation_loss_is_that_of_the_answer_tokens_whatever_was_trained",
    ),
    "data repeated on resume": (
        "experiment/checkpoints.py",
        "    return meta\n",
        '    return {**meta, "step": 0}\n',
        "test_train.py::test_an_interrupted_training_resumes_with_the_next_batch",
    ),
    "the schedule restarted on resume": (
        "experiment/checkpoints.py",
        '"step": torch.tensor(float(meta["step"])',
        '"step": torch.tensor(float(0)',
        "test_train.py::test_an_interrupted_training_resumes_with_the_next_batch",
    ),
}


@pytest.mark.parametrize("bug", MUTANTS)
def test_every_mutant_can_be_planted(bug):
    file, old, new, tests = MUTANTS[bug]
    assert (ROOT / file).read_text(encoding="utf-8").count(old) == 1
    assert old != new
    name, _, test = tests.partition("::")
    assert f"def {test}(" in (ROOT / "tests" / name).read_text(encoding="utf-8")


def run_tests(folder: Path, tests: list[str]) -> subprocess.CompletedProcess:
    """Run some tests in a copy of the project."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    names = [f"tests/{test}" for test in tests]
    return subprocess.run([*command, *names], cwd=folder, capture_output=True, text=True)


@pytest.fixture
def copy(tmp_path) -> Path:
    for part in PARTS:
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


@pytest.mark.slow
def test_the_copy_without_a_bug_is_green(copy):
    done = run_tests(copy, sorted({tests for _, _, _, tests in MUTANTS.values()}))
    assert done.returncode == 0, done.stdout[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("bug", MUTANTS)
def test_the_suite_fails_where_a_known_bug_is_planted(bug, copy):
    file, old, new, tests = MUTANTS[bug]
    planted = (ROOT / file).read_text(encoding="utf-8").replace(old, new)
    (copy / file).write_text(planted, encoding="utf-8")
    done = run_tests(copy, [tests])
    assert done.returncode == 1, done.stdout[-2000:]  # 1: tests failed; others: could not run
