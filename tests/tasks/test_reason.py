"""The task `reason`: problems, traces, rewards and test-time scaling."""

import dataclasses
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

import eval as judge
import measure.reasoning
import train
from configs.schema import LabError, Model, Recipe
from experiment.cost import CountedForward
from experiment.experiment import new_model, new_student, open_experiment, training_set_of
from experiment.plan import Plan
from experiment.run import Run
from experiment.stages import made_of
from measure.evaluate import TeacherReference
from measure.reasoning import SAMPLES, THINKING_TOKENS, VOTES, first_wrong_steps, majority
from measure.report.sentences import facts_of
from measure.statistics import Estimate
from models.generate import answers_of
from models.language import build_model, initialise, save_model
from models.rows import collate
from student.objectives import policy_gradient
from student.on_policy import OnPolicy, write
from student.training_set import TrainingSet
from tasks.reason import (
    Reason,
    answer_follows,
    first_of,
    first_wrong_step,
    has_sound_steps,
    is_faithful,
    read_problem,
    read_solution,
    same_steps,
    split_of,
)
from teacher.signal import Signal
from tests.browser import problems_of
from tests.helpers import ROOT

pytestmark = pytest.mark.xdist_group("reason")  # one process trains the run of this file
TINY = str(ROOT / "configs" / "reason-tiny.yaml")
PENS = "A box holds 7 pens. 5 more go in. 3 are taken out. How many are in the box?"


@pytest.fixture(scope="module")
def task():
    return Reason(limit=1000)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    runs = tmp_path_factory.mktemp("reason")
    assert train.main([TINY, "--runs", str(runs)]) == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure.reasoning, "PROBLEMS", 4)  # models this small rarely end an answer
        assert judge.main([str(runs / "reason-tiny")]) == 0
    return Run.finished(runs / "reason-tiny")


# -- problems --------------------------------------------------------------------------------------


def test_no_test_problem_occurs_in_training_in_any_words(task):
    arithmetic = {s: [p.canonical for p in problems] for s, problems in task.by_split.items()}
    for split in ("validation", "heldout", "long"):
        assert not {*arithmetic[split]} & {*arithmetic["train"]}
        assert len({*arithmetic[split]}) == len(arithmetic[split])
    for split, problems in arithmetic.items():
        assert {split_of(problem) for problem in problems} == {split}


def test_first_steps_are_split_as_they_were_for_the_committed_results():
    """Otherwise they would be evaluated on problems that later teachers train on."""
    steps = [f"{a}{b:+d}" for a in range(100) for b in (*range(-9, -1), *range(2, 10))]
    splits = [split_of(step) for step in steps]
    counts = [splits.count(split) for split in ("train", "validation", "heldout")]
    assert counts == [1414, 95, 91]


def test_no_evaluation_problem_is_a_prefix_or_extension_of_another(task):
    def beginnings(problem):
        first = problem.start
        return {f"{first}" + "".join(f"{o:+d}" for o in problem.operands[: n + 1])
                for n in range(len(problem.operands))}  # fmt: skip

    trained = set().union(*(beginnings(p) for p in task.by_split["train"]))
    for split in ("validation", "heldout", "long"):
        tested = set().union(*(beginnings(p) for p in task.by_split[split]))
        assert not tested & trained


def test_problems_are_what_they_are_meant_to_be(task):
    for split, steps in (("train", range(1, 6)), ("heldout", range(1, 6)), ("long", range(6, 9))):
        problems = task.by_split[split]
        assert {len(problem.operands) for problem in problems} == {*steps}
        for problem in problems:
            assert all(0 <= value <= 99 for value in problem.values)
            assert all(2 <= abs(operand) <= 9 for operand in problem.operands)
            assert read_problem(problem.question) == problem
    assert [len(p.operands) for p in task.by_split["train"]] == sorted([1, 2, 3, 4, 5] * 200)


def test_a_question_in_plain_english_has_the_solution_that_it_asks_for(task):
    assert task.truths(PENS) == ["<think> 7+5=12;12-3=9 </think> 9"]
    assert task.truths("How many?") == []


def test_a_row_is_question_reasoning_and_answer(task, tmp_path):
    rows = task.rows("train")
    i = len(rows) - 1
    problem = task.by_id[int(rows.ids[i])]
    answer = task.render(rows.completion(i).tolist())
    assert answer == f"<think> {problem.trace} </think> {problem.answer}"
    assert rows.prompt(i).tolist() == task.prompt(problem.question)
    assert task.without_reasoning(rows.completion(i).tolist()) == task.encode(
        f"{problem.answer} </s>"
    )
    assert task.is_right(rows, i)
    longest = task.rows("long")
    assert (longest.lengths - longest.prompt_lengths).max() <= task.longest_answer
    assert longest.prompt_lengths.max() <= task.longest_row - task.longest_answer
    task.tokenizer.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer("<s>" + problem.question)["input_ids"] == task.prompt(problem.question)


# -- answers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "steps", "answer", "faithful"),
    [
        ("<think> 7+5=12;12-3=9 </think> 9", [(7, 5, 12), (12, -3, 9)], 9, True),
        ("<think> 7+5=12;12-3=9 </think> 8", [(7, 5, 12), (12, -3, 9)], 8, False),
        ("<think> 7+5=13;13-3=10 </think> 10", [(7, 5, 13), (13, -3, 10)], 10, False),
        ("<think> 7+5=12;11-3=8 </think> 8", [(7, 5, 12), (11, -3, 8)], 8, False),
        ("<think> 7+5=;-3=9 </think> 9", [None, None], 9, False),
        ("<think> 7+5=12", [(7, 5, 12)], None, False),
        ("9", [], 9, False),
        ("</think> 9", [], 9, False),
        ("<think> </think> 9", [None], 9, False),
        ("", [], None, False),
        ("7+5", [], None, False),
    ],
)
def test_the_final_answer_is_read_literally(text, steps, answer, faithful):
    solution = read_solution(text)
    assert (solution.steps, solution.answer) == (steps, answer)
    assert is_faithful(solution) == faithful


def test_sound_steps_and_an_answer_that_follows_are_two_things():
    sums_wrong = read_solution("<think> 7+5=13;13-3=10 </think> 10")
    assert answer_follows(sums_wrong)
    assert not has_sound_steps(sums_wrong)
    answers_else = read_solution("<think> 7+5=12;12-3=9 </think> 8")
    assert has_sound_steps(answers_else)
    assert not answer_follows(answers_else)


def test_the_first_wrong_step_is_the_first_that_is_not_the_problems():
    right = [(7, 5, 12), (12, -3, 9)]
    assert first_wrong_step(right, right) is None
    assert first_wrong_step([(7, 5, 12), (12, -3, 8)], right) == 2
    assert first_wrong_step([None, (12, -3, 9)], right) == 1
    assert first_wrong_step(right[:1], right) == 2
    assert first_wrong_step([*right, (9, 2, 11)], right) == 3
    assert same_steps([None, (12, -3, 9)], right) == 1
    assert same_steps([None], [None]) == 0


def test_grades_are_counted_by_number_of_steps(task):
    rows = task.rows("heldout")
    problems = [task.by_id[int(i)] for i in rows.ids]
    right = [f"<think> {p.trace} </think> {p.answer}" for p in problems]
    guessed = [
        p.answer if len(p.operands) == 2 else text for p, text in zip(problems, right, strict=True)
    ]
    columns = task.grade(rows.ids, guessed)
    assert columns["right"].all()
    assert columns["right_2"].sum() == columns["rows_2"].sum() > 0
    assert columns["faithful"].sum() == len(rows) - columns["rows_2"].sum()
    assert columns["right_steps"].sum() == columns["steps"].sum() - 2 * columns["rows_2"].sum()
    assert columns["rows_4_5"].sum() == columns["rows_4"].sum() + columns["rows_5"].sum()
    wrong = task.grade(rows.ids, ["<think> </think> 100"] * len(rows))
    assert wrong["wrong"].all()
    agreed = task.agree(guessed, right)
    assert agreed["same_answer"].all()
    assert agreed["same_steps"].sum() == columns["right_steps"].sum()
    found = first_wrong_steps(task, rows, guessed)
    assert found["2"] == [0, int(columns["rows_2"].sum()), 0, 0]
    assert found["5"][0] == columns["rows_5"].sum()


# -- rewards ---------------------------------------------------------------------------------------


def test_the_policy_gradient_is_that_of_the_weighted_log_likelihood(generator):
    logits = torch.randn(6, 5, generator=generator, requires_grad=True)
    targets, advantages = torch.tensor([0, 1, 2, 3, 4, 0]), torch.tensor([1.0, 1, -1, 0, 2, 0])
    policy_gradient(logits, Signal(targets, advantages=advantages)).sum().backward()
    chances = logits.detach().softmax(-1)
    expected = advantages[:, None] * (chances - torch.nn.functional.one_hot(targets, 5))
    torch.testing.assert_close(logits.grad, expected)


def policy_of(task, rewards, batch_rows=32, group=8):
    recipe = Recipe(
        access="none", sequences="student", objective="policy_gradient", student={"group": group}
    )
    return OnPolicy(
        rows=task.rows("train"), teacher=None, rewards=rewards, counted=CountedForward,
        recipe=recipe, seed=0, batch_rows=batch_rows, longest=4,
        end=task.tokenizer.eos_token_id, vocabulary=len(task.tokenizer),
    )  # fmt: skip


def small_model(task, seed=0):
    shape = Model(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, initializer_range=0.2)
    return initialise(build_model(shape, task), seed)


def test_an_advantage_is_the_reward_relative_to_its_group(task):
    def even_first_token(rows):
        return np.array([rows.completion(i)[0] % 2 == 0 for i in range(len(rows))], float)

    written = policy_of(task, even_first_token).written(small_model(task), step=3)
    rows = written.rows
    assert 8 <= len(rows) <= 32
    for group in rows.ids.reshape(-1, 8):
        assert len({*group.tolist()}) == 1  # eight answers to one prompt
    rewards = even_first_token(rows).reshape(-1, 8)
    signal = written.signal(collate(rows, np.arange(len(rows)), 0))
    ends = np.cumsum(rows.lengths - rows.prompt_lengths)
    # the loss of a step is the mean over its tokens: this makes it a mean over answers
    lengths = rows.lengths - rows.prompt_lengths
    found = signal.advantages[ends - 1].numpy() * lengths / lengths.mean()
    assert len({*lengths.tolist()}) > 1
    found = found.reshape(-1, 8)
    for given, advantages in zip(rewards, found, strict=True):
        assert 0 < given.mean() < 1  # other groups are dropped
        assert advantages.sum() == pytest.approx(0, abs=1e-5)
        assert advantages[given == 1].min() > 0 > advantages[given == 0].max()
        assert advantages.std() == pytest.approx(1, abs=1e-5)
    assert written.flops > 0


def test_equally_good_answers_give_no_gradient(task):
    written = policy_of(task, lambda rows: np.ones(len(rows))).written(small_model(task), step=3)
    assert len(written.rows) == 8
    assert not written.signal(collate(written.rows, np.arange(8), 0)).advantages.any()


def test_rewards_teach_a_student_what_they_reward(task):
    nine = task.token_ids["9"]

    def says_nine(rows):
        return np.array([rows.completion(i)[0] == nine for i in range(len(rows))], float)

    policy, student = policy_of(task, says_nine, batch_rows=64), small_model(task)
    optimiser = torch.optim.Adam(student.parameters(), lr=0.02)
    shares = []
    asked = policy.rows.take(np.arange(200))
    for step in range(60):
        shares.append(says_nine(write(student, asked, policy, torch.Generator())).mean())
        written = policy.written(student, step)
        batch = collate(written.rows, np.arange(len(written.rows)), 0)
        logits = student(batch.input_ids, use_cache=False).logits[batch.counted]
        optimiser.zero_grad()
        policy_gradient(logits, written.signal(batch)).mean().backward()
        optimiser.step()
    assert np.mean(shares[:5]) < 0.2
    assert np.mean(shares[-5:]) > 0.9


# -- test-time scaling -----------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [0, 1, 5])
def test_a_model_that_thinks_too_long_is_made_to_answer(budget, task):
    rows, model = task.rows("heldout").take(np.arange(20)), small_model(task, seed=1).eval()
    options = {"longest": 12, "end": task.tokenizer.eos_token_id}
    free = dict(answers_of(model, rows, **options))
    cut = dict(
        answers_of(
            model,
            rows,
            **options,
            max_thinking_tokens=budget,
            end_of_reasoning=task.end_of_reasoning,
        )
    )
    for i, answer in cut.items():
        tokens, before = answer.tokens.tolist(), free[i].tokens.tolist()
        if task.end_of_reasoning in before[: budget + 1] or len(before) <= budget:
            assert tokens == before
        else:
            assert tokens[:budget] == before[:budget]
            assert tokens[budget] == task.end_of_reasoning


class Scripted:
    """A fake model and `answers_of`: writes what `words` returns, at 10 FLOPs per token."""

    def __init__(self, words):
        self.words, self.flops = words, 0.0

    def answers_of(self, model, rows, **options):
        assert model is self
        for i in range(len(rows)):
            tokens = torch.as_tensor(self.words(rows, i, options))
            self.flops += 10 * len(tokens)
            yield i, SimpleNamespace(tokens=tokens)


def test_cut_reasoning_costs_only_the_tokens_written(task, monkeypatch):
    rows = task.rows("heldout").take(np.arange(6))

    def words(rows, i, options):  # from 8 thoughts on, the right answer follows
        assert options["end_of_reasoning"] == task.end_of_reasoning
        thoughts = options["max_thinking_tokens"] - 1  # <think> does not count
        number = task.true_answer(rows, i) if thoughts >= 8 else None
        answer = [] if number is None else task.encode(f" {number}")
        return [task.token_ids["+"]] * thoughts + [task.end_of_reasoning] + answer

    model = Scripted(words)
    monkeypatch.setattr(measure.reasoning, "answers_of", model.answers_of)
    curve = measure.reasoning.thinking_curve(model, task, rows)
    assert [point["amount"] for point in curve] == [0, 4, 8, 12, 16, 24, 32, 48, 64]
    assert [point["accuracy"] for point in curve] == [
        float(budget >= 8) for budget in THINKING_TOKENS
    ]
    digits = np.mean([len(task.encode(f" {task.true_answer(rows, i)}")) for i in range(6)])
    expected = [1 + budget + digits * (budget >= 8) for budget in THINKING_TOKENS]
    assert [point["tokens_per_problem"] for point in curve] == pytest.approx(expected)
    assert [p["flops_per_problem"] for p in curve] == pytest.approx([10 * n for n in expected])


def test_votes_are_counted_in_groups_and_cost_their_share(task, monkeypatch):
    """Three of four answers to one problem are right; of four answers to the other only the first
    is, and the other three differ. One vote is right as often as drawn; more votes always are, as
    ties go to the first."""
    rows = task.rows("heldout").take(np.array([0, 5]))

    def words(again, i, options):
        right, draw = task.true_answer(again, i), i % SAMPLES
        answer = right + (draw % 4 == 3) if i < SAMPLES else right + draw % 4
        return task.encode(f" {answer % 100:02d}")  # two digits: all are as long

    model = Scripted(words)
    monkeypatch.setattr(measure.reasoning, "answers_of", model.answers_of)
    curve = measure.reasoning.voting_curve(model, task, rows, seed=0)
    assert [point["amount"] for point in curve] == list(VOTES)
    assert [point["accuracy"] for point in curve] == [0.5, 1, 1, 1]
    written = len(task.encode(" 07"))
    assert [p["tokens_per_problem"] for p in curve] == [written * votes for votes in VOTES]
    assert [p["flops_per_problem"] for p in curve] == [10 * written * votes for votes in VOTES]


def test_a_point_of_a_curve_has_wilsons_interval_over_its_problems():
    point = measure.reasoning.curve_point(4, 0.9, tokens=500, flops=1000, problems=50)
    z, share = 1.959964, 0.9
    middle = (share + z**2 / 100) / (1 + z**2 / 50)
    half = z / (1 + z**2 / 50) * math.sqrt(share * (1 - share) / 50 + z**2 / 10_000)
    assert point["ci95"] == pytest.approx([middle - half, middle + half], abs=1e-6)
    assert (point["tokens_per_problem"], point["flops_per_problem"]) == (10, 20)


def test_the_most_common_answer_wins_and_a_missing_answer_has_no_vote():
    assert majority([3, None, 4, 4, None, None]) == 4
    assert majority([3, 4]) == 3
    assert majority([None]) is None


# -- the whole pipeline ----------------------------------------------------------------------------


def test_each_way_to_learn_gets_its_own_outputs(run):
    config = run.config()
    lab = open_experiment(config, run)
    written = {
        name: training_set_of(lab, recipe, 0, CountedForward)
        for name, recipe in config.recipes.items()
    }
    traces, answers, right = (written[name].rows for name in ("traces", "answers", "right"))
    assert len(traces) == 150
    by_id = {int(answers.ids[i]): i for i in range(len(answers))}
    for i in range(150):
        answer = lab.task.without_reasoning(traces.completion(i).tolist())
        place = by_id.pop(int(traces.ids[i]), None)
        assert (place is None) == (answer == [])  # its reasoning did not end
        if place is not None:
            assert answers.prompt(place).tolist() == traces.prompt(i).tolist()
            assert answers.completion(place).tolist() == answer
    assert not by_id
    assert len(answers) > 75
    kept = [int(traces.ids[i]) for i in range(150) if lab.task.is_right(traces, i)]
    assert right.ids[np.arange(len(right))].tolist() == kept
    assert written["own"].on_policy.teacher is not None
    assert written["grpo"].on_policy.teacher is None


def test_a_policy_starts_from_the_student_that_warmed_it_up_and_pays_for_it(run):
    config = run.config()
    assert Plan(config).prerequisites(config.recipes["grpo"]) == [
        "students/warm/seed-0", "outputs/teacher-text-train-150",
    ]  # fmt: skip
    spent = sum(
        run.cost_of(stage)["flops"]
        for stage in ("students/grpo/seed-0", *Plan(config).prerequisites(config.recipes["grpo"]))
    )
    budget = config.students.budget * run.cost_of("teacher")["flops"]
    assert 0.85 * budget < spent <= budget


def test_every_seed_of_a_policy_starts_from_its_own_student(run, tmp_path):
    """Students that start from the same one would not be independent."""
    config = run.config()
    elsewhere = Run(tmp_path)
    lab = dataclasses.replace(open_experiment(config, run), run=elsewhere)
    elsewhere.manifest["stages"] = {}
    for seed in (0, 1):
        model, stage = (
            new_model(lab, config.students.model, 10 + seed),
            f"students/warm/seed-{seed}",
        )
        save_model(model, lab.task.tokenizer, tmp_path / stage, "a card")
        elsewhere.manifest["stages"][stage] = made_of(tmp_path / stage, model)
    grpo = config.recipes["grpo"]
    for seed in (0, 1):
        found = new_student(lab, grpo, TrainingSet(lab.rows), seed).state_dict()
        expected = new_model(lab, config.students.model, 10 + seed).state_dict()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_evaluation_reports_reasoning(run):
    result = json.loads((run.folder / "eval.json").read_text("utf-8"))
    for entry in (result["teacher"], *result["students"].values(), result["controls"]["baseline"]):
        thinks = entry["recipe"] is None or entry["recipe"]["outputs"]["traces"] != "none"
        assert {"accuracy", "accuracy_1", "accuracy_5"} <= {*entry["quality"]}
        assert ("faithfulness" in entry["quality"]) == thinks
        assert "accuracy_6" not in entry["quality"]
        assert {"accuracy_6", "accuracy_8"} <= {*entry["long"]["quality"]}
        voting = entry["reasoning"]["voting"]
        assert [point["amount"] for point in voting] == list(VOTES)
        costs = [point["flops_per_problem"] for point in voting]
        assert costs[-1] == pytest.approx(SAMPLES * costs[0])
        assert len(entry["reasoning"]["long"]["voting"]) == len(VOTES)
        assert all(p["ci95"][0] <= p["accuracy"] <= p["ci95"][1] for p in voting)
    assert result["students"]["answers"]["reasoning"]["thinking"] is None
    thinking = result["controls"]["baseline"]["reasoning"]["thinking"]
    assert [point["amount"] for point in thinking] == list(THINKING_TOKENS)
    assert all(0 <= point["accuracy"] <= 1 <= point["tokens_per_problem"] for point in thinking)
    (verdict,) = result["verdicts"]
    assert verdict["claim"] == "traces beats answers"
    assert "rows" not in result["laws"]


def test_the_map_has_a_verdict_for_every_pair_and_number_of_steps(run):
    """All corrected together; only students of traces are paired with `answers`."""
    result = json.loads((run.folder / "eval.json").read_text("utf-8"))
    pairs = {"traces beats answers", "right beats answers", "logits beats answers"}
    cells = {(cell["claim"], cell["split"], cell["steps"]) for cell in result["map"]}
    assert len(result["map"]) == 3 * 8
    assert cells == {
        (claim, "long" if steps > 5 else "heldout", steps)
        for claim in pairs
        for steps in range(1, 9)
    }
    cell = next(c for c in result["map"] if c["steps"] == 7 and "logits" in c["claim"])
    entries = [
        result["students"][name]["long"]["quality"]["accuracy_7"] for name in ("logits", "answers")
    ]
    assert cell["difference"] == pytest.approx(entries[0]["mean"] - entries[1]["mean"])
    facts = facts_of(result)
    assert sum(" by number of steps (exploratory, 24 cells): " in fact for fact in facts) == 3
    line = next(
        fact for fact in facts if fact.startswith("baseline: right answers % at 1, 2, ... ")
    )
    assert line.count("|") == 1
    assert any("of the teacher's training FLOPs" in fact for fact in facts)


def test_problems_with_the_same_first_step_vary_together(task):
    """Otherwise correlated problems would be counted as independent."""
    rows = task.rows("heldout")
    units = task.units(rows.ids)
    firsts = [first_of(task.by_id[int(i)].canonical) for i in rows.ids]
    assert len({*units.tolist()}) == len({*firsts}) < len(rows)
    model = small_model(task).eval()
    reference = TeacherReference(model, task, rows)
    evaluated = reference.evaluate(model)
    evaluated.columns["right"] = (units < units.max() / 2).astype(float)
    (clustered,) = (reference.metrics([evaluated])["quality"]["accuracy"],)
    independent = Estimate.of(np.stack([evaluated.columns["right"], np.ones(len(rows))], -1)[None])
    assert clustered.mean == pytest.approx(independent.mean)
    width = {
        name: np.ptp(m.summary()["ci95"]) for name, m in (("c", clustered), ("a", independent))
    }
    assert width["c"] > 1.3 * width["a"]


def test_the_report_shows_reasoning(run):
    report = (run.folder / "report.html").read_text("utf-8")
    for heading in (
        "Accuracy by number of steps", "Test-time scaling", "Where traces go wrong",
        "Where traces pay",
    ):  # fmt: skip
        assert f"<h2>{heading}</h2>" in report
    assert problems_of(run.folder / "report.html") == []


def test_ask_prints_thinking_and_answer(run, capsys):
    assert judge.main([str(run.folder), "--ask", PENS]) == 0
    output = capsys.readouterr().out
    assert "<think> 7+5=12;12-3=9 </think> 9" in output
    for name in ("right answer", "teacher", "traces", "answers", "grpo"):
        assert f"\n| {name} " in output
    assert judge.main([str(run.folder), "--ask", "A dog eats 3 pens. How many?"]) == 2
    assert "'dog' is not in the vocabulary" in capsys.readouterr().err


def test_a_sound_reasoning_run_passes_all_checks(run, capsys):
    assert judge.main([str(run.folder), "--selfcheck"]) == 0
    output = capsys.readouterr().out
    assert "grpo: first loss" in output


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["recipes.traces.outputs.traces=rigth"], "found 'rigth'"),
        (["recipes.logits.outputs.traces=none"], "keeps only the answers"),
        (["recipes.own.outputs.traces=right"], "use sequences teacher"),
        (["recipes.grpo.access=logits"], "learns from right/wrong rewards"),
        (["recipes.grpo.sequences=data"], "learns from right/wrong rewards"),
        (["recipes.grpo.student.temperature=0.7"], "the policy at temperature 1"),
        (
            ["verdicts=[{claim: traces beats answers, metric: accuracy_7}]"],
            "split heldout has problems of 1 to 5 steps",
        ),
        (
            ["verdicts=[{claim: traces beats answers, metric: accuracy_4_5, split: long}]"],
            "split long has problems of 6 to 8 steps",
        ),
        (["compare={against: [baseline], metrics: [accuracy_7]}"], "has problems of 1 to 5 steps"),
        (
            ["verdicts=[{claim: traces beats answers, metric: accuracy, threshold: 30}]"],
            "a fraction; did you mean 0.3?",
        ),
        (
            [
                "recipes.own={access: logits, sequences: student, teachers: [warm], "
                "student: {initial_layers: [1]}}"
            ],
            "is scored by itself",
        ),
        (["task={name: pronounce}", "verdicts=[]"], "need a task with reasoning"),
        (["verdicts=[{claim: traces beats answers, metric: word_error_rate}]"], "has no metric"),
        (
            ["recipes.logits.outputs.prompts=invented", "teacher.training.prompt_weight=0.1"],
            "cannot use prompts that a teacher invented",
        ),
        (
            [
                "students.training.prompt_weight=0.1",
                "recipes={grpo: {access: none, sequences: student, objective: policy_gradient}}",
                "verdicts=[]",
            ],
            "are only for answers",
        ),
    ],
    ids=lambda value: value[0].split("=")[0] if isinstance(value, list) else None,
)
def test_reasoning_that_cannot_work_is_rejected_in_one_line(overrides, message, tmp_path, capsys):
    assert train.main([TINY, *overrides, "--runs", str(tmp_path)]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1


def test_a_limit_is_shared_by_the_numbers_of_steps():
    """1,001 training problems of 1 to 5 steps: 201 of each, or fewer where fewer exist; the other
    splits are a fifth of that for each number."""
    few = Reason(limit=1001).by_split
    counts = {
        split: np.bincount([len(p.operands) for p in problems], minlength=9)[1:].tolist()
        for split, problems in few.items()
    }
    assert counts["train"] == [201] * 5 + [0] * 3
    assert counts["validation"] == counts["heldout"] == [40] * 5 + [0] * 3
    assert counts["long"] == [0] * 5 + [40] * 3


def test_a_question_that_leaves_no_room_for_an_answer_is_refused(task):
    with pytest.raises(LabError, match=r"the question has 0 words, expected 1 to \d+"):
        task.prompt("")
    with pytest.raises(LabError, match=r"the question has 900 words, expected 1 to \d+"):
        task.prompt("pens " * 900)


def test_operands_have_one_digit_and_values_at_most_two(task):
    for problems in task.by_split.values():
        for problem in problems:
            assert 2 <= problem.start <= 99
            assert all(2 <= abs(operand) <= 9 for operand in problem.operands)
            values = np.cumsum([problem.start, *problem.operands])
            assert 0 <= values.min() <= values.max() <= 99
