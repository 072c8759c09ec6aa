"""Tuning: equal numbers of tries, chosen on the validation split, in force afterwards."""

import json
from unittest.mock import patch

import pytest

import eval as judge
import train
from configs.files import read_yaml
from experiment import tuning
from experiment.budget import flops_left
from experiment.cost import CountedForward
from experiment.experiment import open_experiment, training_set_of
from experiment.plan import Plan
from experiment.reading import check_config, read_config
from experiment.run import Run
from experiment.tries import sha256_of_tuned, tries_of
from tasks import load_task
from tests.helpers import ROOT

pytestmark = pytest.mark.xdist_group("tuning")  # one process makes the runs

CONFIG = """\
# A comment that stays.
name: tuned
task: {limit: 600}
seeds: [0]
threads: 1
teacher:
  model: {hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, initializer_range: 0.15}
  training: {batch_rows: 32, learning_rate: 0.01}
  epochs: 1
students:
  model: {hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, initializer_range: 0.2}
  training: {batch_rows: 32}
  budget: 0.8
recipes:
  text: {access: text, sequences: teacher, objective: cross_entropy}
  own: {access: logits, sequences: student, objective: reverse_kl, teachers: [assistant]}
  assistant:
    access: logits
    outputs: {transfer_rows: 150}
    student: {budget_fraction: 0.4}
controls: [baseline, shuffled, gold, smoothed]
verdicts:
  - {claim: text beats baseline, metric: word_error_rate}
tune: {learning_rate: [0.005, 0.02], transfer_rows: [100, 200], seed: 9}
"""


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuning")
    path = folder / "tuned.yaml"
    path.write_text(CONFIG, encoding="utf-8")
    with patch.object(tuning, "teacher_references", wraps=tuning.teacher_references) as asked:
        assert train.main([str(path), "--tune", "--runs", str(folder)]) == 0
        judged = {
            (split, rows.digest())
            for call in asked.call_args_list
            for split, rows in call.args[3].items()
        }
    task = load_task(read_config(path).task)
    assert judged == {("validation", task.rows("validation").digest())}
    return path


def test_every_recipe_and_control_has_the_same_number_of_tries(tuned):
    config = read_config(tuned)
    assert {len(tries) for tries in config.tuned.tries.values()} == {4}
    assert list(config.tuned.tries) == ["text", "assistant", "baseline", "own", "shuffled", "gold",
        "smoothed"]  # fmt: skip
    pairs = {(one.learning_rate, one.transfer_rows) for one in config.tuned.tries["text"]}
    assert pairs == {(0.005, 100), (0.005, 200), (0.02, 100), (0.02, 200)}
    for name in ("own", "baseline", "shuffled", "gold", "smoothed"):
        rates = sorted(one.learning_rate for one in config.tuned.tries[name])
        assert rates == pytest.approx([0.005, 0.00794, 0.0126, 0.02])


def test_the_best_on_the_validation_split_is_in_force(tuned):
    config = read_config(tuned)
    for name, tries in config.tuned.tries.items():
        best, recipe = tries[0], Plan(config).recipes[name]
        for other in tries[1:]:
            mine, its = best.validation, other.validation
            first = next((key for key in mine if mine[key] != its[key]), None)
            higher = first == "sequence_agreement"
            assert first is None or (mine[first] > its[first]) == higher
        assert recipe.student.learning_rate == best.learning_rate
        if name == "text":
            assert recipe.outputs.transfer_rows == best.transfer_rows
    plan = Plan(config)
    rows = plan.recipes["text"].outputs.transfer_rows
    assert plan.recipes["gold"].outputs.transfer_rows == rows
    assert plan.recipes["shuffled"].outputs.transfer_rows == rows
    assert plan.recipes["assistant"].outputs.transfer_rows == 150


def test_what_needs_others_is_tried_with_their_best(tuned):
    config = read_config(tuned)
    later = Run.finished(tuned.parent / "tuned-tuning-2").config()
    assert later.recipes["assistant"] == config.recipes["assistant"]
    assert {n.rpartition("--")[0] for n in later.recipes} - {""} == {
        "own", "shuffled", "gold", "smoothed"
    }  # fmt: skip
    assert later.seeds == [9]


def test_tuning_keeps_the_rest_of_the_config_and_resumes(tuned):
    before = tuned.read_text("utf-8")
    assert before.startswith(CONFIG)
    assert train.main([str(tuned), "--tune", "--runs", str(tuned.parent)]) == 0
    assert tuned.read_text("utf-8") == before


def test_the_cost_of_tuning_is_in_the_result(tuned):
    config = read_config(tuned)
    runs = [Run.finished(tuned.parent / f"tuned-tuning-{n}") for n in (1, 2)]
    rows = [row for run in runs for row in run.ledger]
    paid = [r for r in rows if r["stage"] != "teacher" and "copied_from" not in r]
    assert config.tuned.flops == pytest.approx(sum(row["flops"] for row in paid))
    assert train.main([str(tuned), "--runs", str(tuned.parent)]) == 0
    run = tuned.parent / "tuned"
    assert judge.main([str(run)]) == 0
    result = json.loads((run / "eval.json").read_text("utf-8"))
    first = result["cost"]["stages"][0]
    assert (first["stage"], first["flops"]) == ("tuning", config.tuned.flops)
    report = (run / "report.html").read_text("utf-8")
    assert "<h2>Tuning</h2>" in report
    best = config.tuned.tries["gold"][0]
    assert f"{best.learning_rate:g}" in report
    assert f"{100 * best.validation['word_error_rate']:.1f}" in report


def test_gold_trains_on_the_datas_answers_for_the_rows_that_the_teacher_answers(tuned):
    config = read_config(tuned)
    assert train.main([str(tuned), "--runs", str(tuned.parent)]) == 0
    experiment = open_experiment(config, Run.finished(tuned.parent / "tuned"))
    text, gold = (experiment.plan.recipes[name] for name in ("text", "gold"))
    answers, data = (training_set_of(experiment, r, 0, CountedForward).rows for r in (text, gold))
    assert sorted(answers.ids) == sorted(data.ids)
    known = {int(i): n for n, i in enumerate(experiment.rows.ids)}
    for n, i in enumerate(data.ids):
        assert data.row(n).tolist() == experiment.rows.row(known[int(i)]).tolist()
    assert flops_left(experiment, gold) == flops_left(experiment, text)
    assert flops_left(experiment, gold) < flops_left(
        experiment, experiment.plan.recipes["baseline"]
    )


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seed: 9}", "seed: 0}", "tune.seed 0 is one of seeds, whose students are judged"),
        ("[baseline, shuffled", "[low_data, shuffled", "low_data was not tuned; tune again"),
        ("[0.005, 0.02]", "[0.005, 0.005]", "expected different ones"),
        ("[0.005, 0.02], ", "[0.005], ", "expected different ones, two or more"),
        ("tune: {", "notes: {", "unknown key 'notes'"),
        ("tune: {", "tune: {other_rates: {texts: [1, 2]}, ", "did you mean 'text'?"),
        ("tune: {", "tune: {other_rates: {own: [1, 2, 3]}, ", "found 3 rates, expected as many as"),
    ],
)
def test_a_config_that_was_not_tuned_as_it_says_is_rejected(old, new, message, tuned, capsys):
    other = tuned.with_name("other.yaml")
    other.write_text(tuned.read_text("utf-8").replace(old, new), encoding="utf-8")
    assert train.main([str(other), "--runs", str(tuned.parent)]) == 2
    assert message in capsys.readouterr().err


def test_a_config_without_tries_to_make_is_rejected(tmp_path, capsys):
    assert train.main([str(ROOT / "configs/tiny.yaml"), "--tune", "--runs", str(tmp_path)]) == 2
    assert "has no section tune" in capsys.readouterr().err


def test_tuning_takes_no_changes_that_the_config_would_not_show(tuned, capsys):
    changes = ["students.budget=0.3", "--tune", "--runs", str(tuned.parent)]
    assert train.main([str(tuned), *changes]) == 2
    assert "make other changes there, not as students.budget=0.3" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_committed_configs_are_tuned_as_they_stand(path):
    """Their tries were made with what the config says today."""
    config = read_config(path)
    if config.tuned:
        assert config.tuned.config == sha256_of_tuned(config)


def test_tries_are_all_pairs_or_as_many_rates():
    config = check_config(read_yaml(CONFIG, "here"), "here")
    assert len(tries_of(config, "text", config.recipes["text"])) == 4
    rates = [one.learning_rate for one in tries_of(config, "own", config.recipes["own"])]
    assert rates == pytest.approx([0.005, 0.00794, 0.0126, 0.02])


@pytest.mark.parametrize("name", ["own", "baseline"])
def test_a_recipe_or_control_may_have_rates_of_its_own(name):
    settings = read_yaml(CONFIG, "here")
    settings["tune"]["other_rates"] = {name: [1e-4, 8e-4]}
    config = check_config(settings, "here")
    rates = [one.learning_rate for one in tries_of(config, name, Plan(config).recipes[name])]
    assert rates == pytest.approx([1e-4, 2e-4, 4e-4, 8e-4])
