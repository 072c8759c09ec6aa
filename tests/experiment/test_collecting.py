"""Outputs that a run buys: from its own teacher, which it serves itself, or from an endpoint."""

import json
import shutil
from types import SimpleNamespace

import psutil
import pytest
import torch

import eval as judge
from configs.schema import LabError
from experiment.bought import PROBED, evaluated_rows
from experiment.collecting import check_seller
from experiment.run import Run
from measure.evaluate import free_running
from teacher.api.store import Store
from teacher.api.tiers import PER_MILLION
from teacher.shards import Outputs
from tests.helpers import train_tiny
from tests.serving import small_teacher

BOUGHT = (
    "teacher.api={permission: its owner}",
    "recipes={"
    "text: {access: text, sequences: teacher, objective: cross_entropy,"
    " outputs: {transfer_rows: 100}}, "
    "top_3: {access: top_k, sequences: teacher, outputs: {k: 3, transfer_rows: 100}}}",
    "controls=[baseline]",
    "verdicts=[]",
    "seeds=[0]",
)


@pytest.fixture(scope="module")
def bought(tmp_path_factory):
    runs = tmp_path_factory.mktemp("bought")
    assert train_tiny(runs, *BOUGHT) == 0
    return Run.finished(runs / "tiny")


def test_the_server_ends_with_the_run(bought):
    assert psutil.Process().children() == []


def test_the_ledger_holds_the_bill(bought):
    store = Store(bought.folder / "api.sqlite")
    names = {row["name"]: row["id"] for row in store.accounts()}
    rows = [row for row in bought.ledger if row["stage"].startswith("outputs/")]
    assert len(rows) == len(names) == 2
    for row in rows:
        bill = store.bill_of(names[row["stage"].removeprefix("outputs/")])
        assert row["money"] == pytest.approx(bill["cost"] / PER_MILLION**2)
        assert row["money"] > 0
        assert (row["requests"], row["flops"]) == (100, 0)
        tokens = row["prompt_tokens"], row["completion_tokens"]
        assert tokens == (bill["prompt_tokens"], bill["completion_tokens"])
    store.close()


def test_what_is_not_sold_to_an_account_is_not_in_its_outputs(bought):
    text, top = (Outputs(bought.folder / s) for s in bought.manifest["stages"] if "outputs" in s)
    assert (text.columns, sorted(top.columns)) == ({}, ["indices", "log_probs", "tail"])


def test_a_student_names_the_terms_on_which_its_outputs_were_bought(bought):
    card = (bought.folder / "students" / "text" / "seed-0" / "README.md").read_text("utf-8")
    assert "terms version 1, which allow distillation: no. Allowed by: its owner." in card
    other = (bought.folder / "students" / "baseline" / "seed-0" / "README.md").read_text("utf-8")
    assert "bought" not in other


def test_terms_that_forbid_it_need_a_permission_even_if_another_run_had_one(bought, capsys):
    code = train_tiny(bought.folder.parent, *BOUGHT[1:], "name=other", "teacher.api={}")
    assert code == 2
    error = capsys.readouterr().err
    assert "teacher.api.permission is missing" in error
    assert len(error.splitlines()) == 1
    assert psutil.Process().children() == []


def test_the_teacher_is_the_one_that_was_not_sold(bought, tiny_run):
    sold, kept = (
        json.loads((folder / "manifest.json").read_text("utf-8"))["stages"]["teacher"]["sha256"]
        for folder in (bought.folder, tiny_run)
    )
    assert sold == kept


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("teacher.api.url=http://example.com/v1", "model is missing"),
        ("teacher.api.model=gpt", "remove it, or name the url"),
        (
            "teacher.api={url: 'http://example.com/v1', model: m, key_env: K}",
            "would send your key in the clear; use https",
        ),
        (
            "teacher.api={url: 'ftp://example.com/v1', model: m, key_env: K}",
            "expected an address as in https://host/v1",
        ),
        ("teacher.api.budget_tokens=0", "budget_tokens"),
        ("recipes.text.sequences=data", "sequences"),
        ("recipes.top_3.sequences=data", "does not score other texts: use sequences teacher"),
        ("recipes.top_3.access=sampled", "access sampled is not sold through an API"),
        ("recipes.top_3.outputs.temperature=0.5", "use 0 or 1"),
        ("recipes.top_3.outputs.prompts=invented", "use prompts train"),
        ("task={name: digits}", "digits has images"),
        ("teacher.api.endpoint=completions", "which a question of task pronounce is not; use chat"),
        ("recipes.top_3.outputs.k=21", "no tier reveals what access top_k learns from with k 21"),
        ("teacher.api.body={top_k: 0, seed: 1}", "teacher.api.body.seed: the recipe decides it"),
    ],
)
def test_what_an_endpoint_cannot_answer_is_refused(change, problem, tmp_path, capsys):
    assert train_tiny(tmp_path, *BOUGHT, change) == 2
    error = capsys.readouterr().err
    assert problem in error
    assert len(error.splitlines()) == 1


def test_a_budget_can_be_raised_and_what_was_bought_is_kept(tmp_path, capsys):
    poor = [*BOUGHT[1:], "teacher.api={permission: me, budget_tokens: 600, at_once: 2}"]
    assert train_tiny(tmp_path, *poor) == 2
    assert "raise teacher.api.budget_tokens" in capsys.readouterr().err
    rich = [*BOUGHT[1:], "teacher.api={permission: me, budget_tokens: 90000, at_once: 8}"]
    assert train_tiny(tmp_path, *rich) == 0
    run = Run.finished(tmp_path / "tiny")
    assert run.config().teacher.api.budget_tokens == 90000
    store = Store(run.folder / "api.sqlite")
    asked = store.database.execute("SELECT COUNT(*) FROM usage").fetchone()[0]
    assert asked == 200  # none twice
    store.close()


def test_a_student_of_another_student_is_not_sold_the_teachers_answers(tmp_path):
    recipes = (
        "recipes={text: {access: text, sequences: teacher, objective: cross_entropy,"
        " outputs: {transfer_rows: 50}, student: {budget_fraction: 0.3}}, "
        "second: {teachers: [text], access: logits, sequences: teacher,"
        " outputs: {transfer_rows: 20}}}"
    )
    assert train_tiny(tmp_path, *BOUGHT, recipes) == 0
    run = Run.finished(tmp_path / "tiny")
    bought = [stage for stage, made in run.manifest["stages"].items() if "bought" in made]
    assert bought == ["outputs/teacher-text-train-50"]
    made = [stage for stage in run.manifest["stages"] if stage.startswith("outputs/")]
    assert len(made) == 2


def test_several_processes_do_not_each_pay(bought):
    two = SimpleNamespace(num_processes=2)
    config = SimpleNamespace(teacher=bought.config().teacher, sold_elsewhere=False)
    with pytest.raises(LabError, match="2 processes would each pay for the answers"):
        check_seller(SimpleNamespace(config=config, accelerator=two))


# -- a teacher behind a url, whose weights are unknown ---------------------------------------------


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    with small_teacher(tmp_path_factory.mktemp("elsewhere")) as teacher:
        yield teacher


def far(elsewhere, **changes):
    """Overrides of the tiny config for a teacher behind an endpoint; its key is in LAB_KEY."""
    api = f"url: '{elsewhere.url}', model: small, key_env: LAB_KEY, permission: its owner"
    api += ", evaluation_rows: 12" + "".join(f", {key}: {value}" for key, value in changes.items())
    return [
        *BOUGHT[1:],
        f"teacher={{api: {{{api}}}}}",
        "task={name: pronounce, limit: 300}",
        "students.budget=null",
        "students.tflops=0.0002",
        "compare={against: [baseline]}",
    ]


@pytest.fixture
def key(elsewhere, monkeypatch):
    account, key = elsewhere.store.add_account("A student", "top5-bulk")
    monkeypatch.setenv("LAB_KEY", key)
    return account


def test_a_run_whose_teacher_is_behind_an_endpoint(elsewhere, key, tmp_path, capsys):
    assert train_tiny(tmp_path, *far(elsewhere)) == 0
    run = Run.finished(tmp_path / "tiny")
    bill = elsewhere.store.bill_of(key)
    assert f"bought     {bill['requests']} answers, " in capsys.readouterr().out
    paid = [row for row in run.ledger if "requests" in row]
    splits = ("validation", *elsewhere.task.evaluation_splits)
    rows = {split: len(elsewhere.task.rows(split)) for split in splits}
    asked = sum(min(12, count) for count in rows.values())
    probes = min(PROBED, rows["validation"], 12)
    assert [row["requests"] for row in paid] == [asked, probes + 100, 100]
    assert_booked(run, bill)
    assert judge.main([str(run.folder)]) == 0
    result = json.loads((run.folder / "eval.json").read_text("utf-8"))
    texts = Answers(elsewhere, evaluated_rows(run.config(), elsewhere.task, "heldout"))
    assert result["teacher"]["quality"]["word_error_rate"]["mean"] == pytest.approx(texts.errors())
    assert result["teacher"]["params"] is None
    assert "kl_teacher_student" not in result["students"]["text"]["fidelity"]
    for measured in ("sequence_agreement", "ece"):
        assert measured in result["students"]["text"]["fidelity"]
    assert "unknown" in (run.folder / "report.html").read_text("utf-8")
    assert judge.main([str(run.folder), "--selfcheck"]) == 0
    assert judge.main([str(run.folder), "--ask", "lead"]) == 0
    assert "not asked again" in capsys.readouterr().out


def assert_booked(run, bill):
    """The ledger has all that the account was billed."""
    paid = [row for row in run.ledger if "requests" in row]
    for key in ("requests", "prompt_tokens", "completion_tokens"):
        assert sum(row[key] for row in paid) == bill[key]
    assert sum(row["money"] for row in paid) == pytest.approx(bill["cost"] / PER_MILLION**2)


class Answers:
    """What the model behind the endpoint answers."""

    def __init__(self, elsewhere, rows):
        self.task, self.rows = elsewhere.task, rows
        self.texts = free_running(elsewhere.model, self.task, rows).texts

    def errors(self):
        return self.task.grade(self.rows.ids, self.texts)["wrong"].mean()


def test_terms_that_forbid_it_stop_before_anything_is_made(elsewhere, key, tmp_path, capsys):
    """With the permission, the same command then works."""
    api = f"url: '{elsewhere.url}', model: small, key_env: LAB_KEY"
    forbidden = [o for o in far(elsewhere) if not o.startswith("teacher=")]
    assert train_tiny(tmp_path, *forbidden, f"teacher={{api: {{{api}}}}}") == 2
    assert "version 1, do not allow that a model is trained on" in capsys.readouterr().err
    assert not (tmp_path / "tiny" / "config.yaml").exists()
    assert elsewhere.store.usage_of(key) == []
    assert train_tiny(tmp_path, *far(elsewhere)) == 0


def test_another_model_behind_the_name_is_noticed(elsewhere, key, tmp_path, capsys):
    few = "recipes={text: {access: text, sequences: teacher, objective: cross_entropy, " + (
        "outputs: {transfer_rows: 20}}}"
    )
    assert train_tiny(tmp_path, *far(elsewhere), few, "compare=null") == 0
    shutil.rmtree(tmp_path / "tiny" / "outputs")
    weight = elsewhere.model.model.embed_tokens.weight
    before = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.mul_(-1)
        assert train_tiny(tmp_path, *far(elsewhere), few, "compare=null") == 2
    finally:
        with torch.no_grad():
            weight.copy_(before)
    shown = capsys.readouterr()
    assert "there is another model behind the name" in shown.err
    assert shown.out.count("No training.") == 2  # the terms, once by each command
    assert train_tiny(tmp_path, *far(elsewhere), few, "compare=null") == 0
    run = Run.finished(tmp_path / "tiny")
    paid = run.cost_of("outputs/teacher-text-train-20")
    assert paid["requests"] == 2 * min(PROBED, 12) + 20  # both probes


def test_other_terms_than_were_accepted_at_first_are_noticed(elsewhere, key, tmp_path, capsys):
    assert train_tiny(tmp_path, *far(elsewhere)) == 0
    shutil.rmtree(tmp_path / "tiny" / "outputs")
    elsewhere.store.publish_terms("2", "No training, ever.", "no")
    _, later = elsewhere.store.add_account("Another", "top5-bulk")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAB_KEY", later)
        assert train_tiny(tmp_path, *far(elsewhere)) == 2
    assert "has terms version 2 now, and this run began under version 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("verdicts=[{claim: text beats baseline, metric: kl_teacher_student}]", "only answers are"),
        ("teacher.epochs=3", "is not trained here; remove teacher.model"),
        ("controls=[baseline, second_teacher]", "second_teacher is trained from another seed"),
        ("teacher={api: {permission: me}}", "teacher.model is missing"),
        ("students={model: {hidden_size: 16}, budget: 0.5}", "num_hidden_layers is missing"),
    ],
)
def test_what_needs_the_weights_is_refused(change, problem, elsewhere, key, tmp_path, capsys):
    assert train_tiny(tmp_path, *far(elsewhere), change) == 2
    assert problem in capsys.readouterr().err
    assert elsewhere.store.usage_of(key) == []


def test_a_key_that_is_missing_or_unknown_is_one_line(elsewhere, monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("LAB_KEY", raising=False)
    assert train_tiny(tmp_path, *far(elsewhere)) == 2
    assert "the environment variable LAB_KEY holds no key; set it" in capsys.readouterr().err
    monkeypatch.setenv("LAB_KEY", "sk-lab-wrong")
    assert train_tiny(tmp_path, *far(elsewhere)) == 2
    assert "this key is not known" in capsys.readouterr().err
