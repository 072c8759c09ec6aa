"""Outputs that a run buys from its own teacher, which it serves itself."""

import json

import psutil
import pytest

from experiment.run import Run
from teacher.api.store import Store
from teacher.api.tiers import PER_MILLION
from teacher.shards import Outputs
from tests.helpers import train_tiny

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
    assert "do not allow that a model is trained on its answers" in error
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
    ],
)
def test_what_an_endpoint_cannot_answer_is_refused(change, problem, tmp_path, capsys):
    assert train_tiny(tmp_path, *BOUGHT, change) == 2
    error = capsys.readouterr().err
    assert problem in error
    assert len(error.splitlines()) == 1
