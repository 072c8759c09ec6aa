"""Ways of composing a method: who teaches, who writes, where a student starts, what it costs."""

import base64
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import eval as judge
import train
from configs.schema import LabError, Recipe
from experiment.cost import CountedForward
from experiment.experiment import open_experiment, outputs_of, teacher_of
from experiment.plan import Plan
from experiment.reading import read_config
from experiment.run import Run
from measure.laws import Law, scaling_laws, students_differing_in
from measure.report.figures import pareto_front, scaling
from measure.report.tables import SHORT_RESULT, facts_of, models_in, more_cells, more_headings
from models.language import Averaged, build_model, initialise, load_model, take_layers
from models.rows import collate, weight_of
from student.loss import Loss
from student.on_policy import OnPolicy
from student.recipe import objective_of
from tasks.pronounce import Pronounce
from teacher.access import ACCESS
from teacher.shards import Outputs
from tests.expected import losses as expected_losses
from tests.helpers import DIVERGENCES

pytestmark = pytest.mark.xdist_group("methods")  # one process trains the run of this file
TINY = str(Path(__file__).parent.parent / "configs" / "tiny.yaml")
MODEL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
RECIPES = {
    "plain": {"access": "logits"},
    "warm": {"access": "logits", "temperature": 2},
    "hot": {"access": "logits", "temperature": 4},
    "top_5": {"access": "top_k", "outputs": {"k": 5}},
    "sampled_6": {"access": "sampled", "outputs": {"k": 6}},
    "own": {"access": "logits", "sequences": "student", "objective": "reverse_kl"},
    "mixed": {
        "access": "top_k",
        "outputs": {"k": 5},
        "student": {"on_policy": {"start": 0, "end": 1}},
    },
    "assistant": {
        "access": "logits",
        "student": {"model": MODEL | {"hidden_size": 24}, "budget_fraction": 0.5},
    },
    "assisted": {"access": "sampled", "outputs": {"k": 6}, "teachers": ["assistant"]},
    "averaged": {"access": "logits", "teachers": ["teacher", "second_teacher"]},
    "related": {
        "access": "hidden",
        "outputs": {"layers": [1]},
        "sequences": "teacher",
        "objective": {"forward_kl": 0.7, "hidden_mse": 0.1, "value_relation_kl": 0.2},
    },
    "born_again": {"access": "logits", "student": {"model": MODEL, "initial_layers": [1]}},
}
OVERRIDES = (
    "name=methods", "seeds=[0]", "controls=[baseline,second_teacher]", "verdicts=[]",
    "teacher.epochs=3",
    f"recipes={json.dumps(RECIPES)}", "compare={against: [baseline, plain]}",
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    runs = tmp_path_factory.mktemp("methods")
    assert train.main([TINY, *OVERRIDES, "--runs", str(runs)]) == 0
    assert judge.main([str(runs / "methods")]) == 0
    return Run.finished(runs / "methods")


def test_every_method_costs_the_same_all_that_it_needs_included(run):
    """Outputs, what the student writes and the teacher scores, and an assistant's training."""
    config, teacher = run.config(), run.cost_of("teacher")["flops"]
    plan = Plan(config)
    for name, recipe in config.recipes.items():
        own = run.cost_of(f"students/{name}/seed-0")["flops"]
        before = sum(run.cost_of(stage)["flops"] for stage in plan.prerequisites(recipe))
        budget = recipe.student.budget_fraction * 0.6 * teacher
        # Who writes does not begin a step that might overspend, here a tenth of the budget.
        least = 0.85 if recipe.writes_itself else 0.9
        assert least * budget < own + before <= budget, name
    assert plan.prerequisites(config.recipes["assisted"]) == [
        "outputs/assistant-data-sampled-6", "students/assistant/seed-0", "outputs/data-logits",
    ]  # fmt: skip
    result = json.loads((run.folder / "eval.json").read_text("utf-8"))
    fractions = result["cost"]["fraction_of_teacher_by_student"]
    assert fractions["assisted"]["flops"] == pytest.approx(0.6, abs=0.03)
    assert fractions["assistant"]["flops"] == pytest.approx(0.3, abs=0.03)


def test_the_ledger_says_what_writing_takes_and_what_a_token_weighs(run):
    for name in ("own", "mixed"):
        cost = run.cost_of(f"students/{name}/seed-0")
        assert 0 < cost["writing_seconds"] < cost["seconds"]
        share = cost["writing_seconds"] / cost["seconds"]
        assert cost["writing_share"] == pytest.approx(share, abs=2e-3)
    assert "writing_seconds" not in run.cost_of("students/plain/seed-0")
    bytes_per_token = {
        stage: run.cost_of(f"outputs/{stage}")["bytes_per_token"]
        for stage in ("data-logits", "data-top_k-5", "assistant-data-sampled-6")
    }
    assert bytes_per_token["data-logits"] > 2 * 72
    assert bytes_per_token["data-top_k-5"] < 60
    assert bytes_per_token["assistant-data-sampled-6"] < 60


def test_every_method_is_compared_with_the_same_two_and_corrected_for_all(run, capsys):
    result = json.loads((run.folder / "eval.json").read_text("utf-8"))
    claims = [verdict["claim"] for verdict in result["verdicts"]]
    assert len(claims) == len(set(claims)) == 2 * (len(RECIPES) - 1) - 1
    assert "assistant beats baseline" not in claims  # it had half the budget
    assert "own beats baseline" in claims
    assert "own beats plain" in claims
    assert "plain beats plain" not in claims
    headings, cells = more_headings(result), more_cells(result, "own")
    assert headings == [
        "cost %", "bytes per token", "agreement with teacher against baseline",
        "agreement with teacher against plain",
    ]  # fmt: skip
    share = result["cost"]["fraction_of_teacher_by_student"]["own"]["flops"]
    assert cells[0] == f"{100 * share:.1f}"
    assert share <= 0.6
    assert cells[1] == "-"  # nothing is stored of what is scored live
    own = next(v for v in result["verdicts"] if v["claim"] == "own beats baseline")
    assert cells[2] == f"{100 * own['difference']:+.1f} {SHORT_RESULT[own['result']]}"
    assert more_cells(result, "plain")[3] == "-"
    (fact,) = facts_of(result)
    assert fact.startswith(f"{len(claims)} comparisons over 1 seed (the intervals are over rows ")
    assert "significant after Holm's correction" in fact


def test_the_report_draws_what_the_recipes_have_in_common(run):
    report = (run.folder / "report.html").read_text("utf-8")
    for heading in ("Bytes against fidelity", "Temperature", "Fidelity against cost"):
        assert f"<h2>{heading}</h2>" in report
    assert "<h2>How many words</h2>" not in report
    result = json.loads((run.folder / "eval.json").read_text("utf-8"))
    assert students_differing_in(result, ("temperature",)) == ["plain", "warm", "hot"]
    assert students_differing_in(result, ("access", "outputs.k")) == ["plain", "top_5", "sampled_6"]


def test_the_pareto_front_is_what_nothing_cheaper_exceeds():
    points = [(1, 5), (2, 4), (2, 7), (3, 7), (4, 9), (1, 3)]
    assert pareto_front(points) == [(1, 5), (2, 7), (4, 9)]


def test_a_student_writes_at_the_steps_that_its_schedule_names_and_in_no_others(tmp_path):
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


def test_several_teachers_are_the_mean_of_their_probabilities(tiny_run):
    models = [load_model(tiny_run / name) for name in ("teacher", "second_teacher")]
    ids = torch.tensor([Pronounce(limit=600).prompt("lab")])
    with torch.no_grad():
        each = [model(ids).logits.softmax(-1) for model in models]
        found = Averaged(models, 72)(ids).logits
    torch.testing.assert_close(found.exp(), sum(each) / 2)


def test_a_student_may_start_from_layers_of_its_teacher():
    task = Pronounce(limit=100)
    shape = read_config(TINY).teacher.model.model_copy(update={"num_hidden_layers": 3})
    teacher = initialise(build_model(shape, task), 0)
    student = initialise(build_model(shape.model_copy(update={"num_hidden_layers": 2}), task), 1)
    take_layers(student, teacher, [1, 3])
    ours, theirs = student.state_dict(), teacher.state_dict()
    for name, tensor in ours.items():
        source = name.replace("layers.1.", "layers.2.")
        assert torch.equal(tensor, theirs[source]), name


# -- vocabularies ----------------------------------------------------------------------------------


def renamed(folder, swap):
    """A copy of a saved tokenizer in which two tokens have each other's ids."""
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text("utf-8"))
    words = content["model"]["vocab"]
    a, b = swap
    words[a], words[b] = words[b], words[a]
    file.write_text(json.dumps(content), "utf-8")


def test_ids_that_mean_other_tokens_are_refused_and_the_ways_that_remain_are_named(run, tmp_path):
    """Both have 72 tokens: a cut to the same width would notice nothing."""
    folder = Path(shutil.copytree(run.folder, tmp_path / "methods"))
    renamed(folder / "teacher", ("AA", "AE"))
    lab = open_experiment(run.config(), Run(folder).reload())
    said = "id 33 is 'AE' and 'AA'.*access text, or objective uld"
    with pytest.raises(LabError, match=said):
        teacher_of(lab, Recipe(access="logits"), CountedForward)
    teacher_of(
        lab, Recipe(access="text", sequences="teacher", objective="cross_entropy"), CountedForward
    )
    teacher_of(lab, Recipe(access="logits", objective="uld"), CountedForward)


def test_rows_that_pad_the_matrices_of_a_model_change_nothing(tmp_path):
    """A teacher and students as wide as 80, of 72 tokens that mean the same."""
    wide = [
        "name=wide", "seeds=[0]", "controls=[baseline]", "verdicts=[]", "teacher.epochs=1",
        "teacher.model.settings={vocab_size: 80}", "students.model.settings={vocab_size: 75}",
        'recipes={plain: {access: logits}, own: {access: logits, sequences: student}, '
        'top: {access: top_k, sequences: teacher}}',
    ]  # fmt: skip
    assert train.main([TINY, *wide, "--runs", str(tmp_path)]) == 0
    assert judge.main([str(tmp_path / "wide")]) == 0
    stored = outputs_of(
        open_experiment(read_config(TINY, wide), Run(tmp_path / "wide").reload()), Recipe()
    )
    signal = stored.signal(collate(stored.rows, np.arange(10), pad=0))
    assert signal.log_probs.shape[-1] == 72
    torch.testing.assert_close(
        signal.log_probs.float().exp().sum(-1), torch.ones(len(signal.targets)), atol=2e-3, rtol=0
    )


# -- the run checks itself -------------------------------------------------------------------------


def findings(folder, capsys):
    code = judge.main([str(folder), "--selfcheck"])
    return code, capsys.readouterr().out


def test_a_sound_run_says_so(run, tiny_run, capsys):
    for folder in (run.folder, tiny_run):
        code, said = findings(folder, capsys)
        assert code == 0, said
        assert "[FAIL]" not in said
        assert said.splitlines()[-1].startswith("all checks passed (")
        assert "the teacher as its own student: KL 0, agreement 1" in said
    for name in ("distilled", "states", "top", "baseline", "shuffled", "smoothed"):
        assert f"{name}: first loss" in said


def test_outputs_read_by_position_are_found(run, capsys, monkeypatch):
    """Planted: each row gets the outputs of the first row of its lengths."""
    pieces = Outputs.pieces

    def by_position(self, column, batch):
        lengths = [*zip(self.rows.lengths, self.rows.prompt_lengths, strict=True)]
        first = [lengths.index(lengths[i]) for i in batch.indices]
        return pieces(self, column, replace(batch, indices=np.array(first)))

    monkeypatch.setattr(Outputs, "pieces", by_position)
    code, said = findings(run.folder, capsys)
    assert code == 1
    assert "[FAIL] outputs/data-logits" in said


def test_a_teacher_that_was_exchanged_after_its_outputs_is_found(tiny_run, tmp_path, capsys):
    copy = Path(shutil.copytree(tiny_run, tmp_path / "tiny"))
    shutil.rmtree(copy / "teacher")
    shutil.copytree(copy / "second_teacher", copy / "teacher")
    code, said = findings(copy, capsys)
    assert code == 1
    assert "[FAIL] outputs/data-logits" in said


def test_a_loss_of_another_scale_is_found(tiny_run, tmp_path, capsys):
    copy = Path(shutil.copytree(tiny_run, tmp_path / "tiny"))
    lines = (copy / "metrics.jsonl").read_text("utf-8").splitlines()
    place = next(i for i, line in enumerate(lines) if '"students/top/seed-0"' in line)
    line = json.loads(lines[place])
    lines[place] = json.dumps(line | {"loss": 2 * line["loss"]})
    (copy / "metrics.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    code, said = findings(copy, capsys)
    assert code == 1
    assert "[FAIL] top: first loss" in said


def test_a_mean_of_means_is_found(tiny_run, capsys, monkeypatch):
    """Planted: every part of a step is divided by its own weight."""
    loss = Loss.__call__

    def of_its_own(self, model, data, indices, normalizer, progress=0.0):
        own = weight_of(data.rows, indices, self.prompt_weight)
        return loss(self, model, data, indices, own, progress) * own[1] / normalizer[1]

    monkeypatch.setattr(Loss, "__call__", of_its_own)
    code, said = findings(tiny_run, capsys)
    assert code == 1
    assert "[FAIL] gradients" in said


def test_a_shuffled_teacher_that_helps_is_found(tiny_run, tmp_path, capsys):
    """As much as the honest one: then it was not what the outputs say that taught."""
    copy = Path(shutil.copytree(tiny_run, tmp_path / "tiny"))
    result = json.loads((copy / "eval.json").read_text("utf-8"))
    metric = {"mean": 0.6, "ci95": [0.59, 0.61], "per_seed": [0.6, 0.6]}
    for arm in (result["students"]["distilled"], result["controls"]["shuffled"]):
        arm["fidelity"]["sequence_agreement"] = metric
    (copy / "eval.json").write_text(json.dumps(result), "utf-8")
    code, said = findings(copy, capsys)
    assert code == 1
    assert "[FAIL] shuffled: 60.0 % of the teacher's answers, against 60.0 % of distilled" in said


@pytest.mark.parametrize(
    ("access", "name"),
    [
        *(("logits", name) for name in ("cross_entropy", *DIVERGENCES)),
        *(("top_k", name) for name in DIVERGENCES if name != "uld"),  # it sorts all
        ("sampled", "forward_kl"),
    ],
)
@pytest.mark.parametrize("squared", [True, False])
def test_the_expected_loss_is_that_of_the_objective(name, access, squared, generator):
    """Two ways to the same number: torch and logarithms there, NumPy and probabilities here."""
    recipe = Recipe(
        access=access, objective=name, divergence={"temperature_squared": squared},
        temperature=2.5 if access == "logits" else 1.0,
    )  # fmt: skip
    teacher, student = (3 * torch.randn(9, 12, generator=generator).double() for _ in range(2))
    targets = torch.arange(9)
    signal = ACCESS[access].reveal(teacher.log_softmax(-1), targets, 4, generator)
    found = objective_of(recipe)(student, signal, 0.0)
    np.testing.assert_allclose(expected_losses(recipe, student.numpy(), signal), found, rtol=1e-9)


def test_interrupted_on_policy_training_goes_on_to_the_same_student(run, tmp_path, monkeypatch):
    """What it wrote is a function of the step, what it cost is in the checkpoint."""
    import experiment.log

    overrides = [*OVERRIDES, "checkpoint_seconds=0"]
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
    for stage, made in run.manifest["stages"].items():
        assert found[stage]["sha256"] == made["sha256"], stage


@pytest.fixture
def scaling_result():
    folder = Path(__file__).parent.parent / "results"
    return json.loads((folder / "scaling.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("study", ["rows", "size"])
def test_a_study_is_drawn_with_all_its_students_and_its_law(study, scaling_result):
    found = scaling_result["laws"][study]
    colours = dict.fromkeys(models_in(scaling_result), "#000")
    drawn = scaling(scaling_result, found, "how much", colours)
    svg = base64.b64decode(drawn.partition(",")[2]).decode()
    assert len(found["x"]) >= 7
    for said in (*found["x"], "how much", f"KL = {Law(*found['law'])}"):
        assert f">{said}<" in svg


def test_students_that_pay_for_more_words_are_no_study_of_words(scaling_result):
    """They train for fewer steps: what more words teach cannot be told from that."""
    result = scaling_result
    assert "rows" in scaling_laws(result)
    for entry in result["students"].values():
        entry["recipe"]["outputs"]["charged"] = True
    assert "rows" not in scaling_laws(result)
