"""Evidence in the students of a run that bought marked answers."""

import re

import numpy as np
import pytest
import torch

import eval as judge
from experiment.evidence import evidence_of, meaning_of_closeness, meaning_of_mark, written
from experiment.experiment import open_model
from experiment.run import Run
from measure.watermark import Found
from models.rows import Rows
from tasks import load_task
from teacher.api.store import Store
from teacher.shards import Outputs
from teacher.watermark import Watermark, write_key
from tests.helpers import train_tiny

KEY = 1_288_833_545
API = f"teacher.api={{permission: its owner, watermark_key: {KEY}}}"
MARKED = (
    "recipes={marked: {access: text, sequences: teacher, objective: cross_entropy,"
    " outputs: {temperature: 1, transfer_rows: 150, watermark: 6}}, "
    "plain: {access: text, sequences: teacher, objective: cross_entropy,"
    " outputs: {temperature: 1, transfer_rows: 150}}}",
    "controls=[baseline, second_teacher]",
    "verdicts=[]",
    "seeds=[0, 1]",
)


@pytest.fixture(scope="module")
def marked(tmp_path_factory):
    runs = tmp_path_factory.mktemp("marked")
    assert train_tiny(runs, API, *MARKED) == 0
    return Run.finished(runs / "tiny")


def test_only_the_answers_that_were_asked_for_are_marked(marked):
    task, owner = load_task(marked.config().task), open_model(marked, "teacher")
    stages = [stage for stage in marked.manifest["stages"] if stage.startswith("outputs/")]
    assert sorted("watermark" in stage for stage in stages) == [False, True]
    for stage in stages:
        z = evidence_of(Outputs(marked.folder / stage).rows, owner, task).z(KEY)
        assert z > 10 if "watermark" in stage else abs(z) < 4
    store = Store(marked.folder / "api.sqlite")
    names = {row["watermark"] for row in store.database.execute("SELECT watermark FROM usage")}
    assert names == {None, Watermark(KEY, task.vocabulary, 6.0).name}
    store.close()


def test_every_student_is_tested_and_what_it_shows_is_said(marked, tmp_path, capsys):
    assert judge.main([str(marked.folder), "--radioactivity", "--tokens", "800"]) == 0
    printed = capsys.readouterr().out
    for name in ("marked", "plain", "baseline"):
        assert len(re.findall(rf"^{name} +[01] +[78]\d\d ", printed, re.MULTILINE)) == 2
    assert "green tokens" in printed
    write_key(tmp_path / "another.json")
    other = ["--radioactivity", "--key", str(tmp_path / "another.json"), "--tokens", "800"]
    assert judge.main([str(marked.folder), *other]) == 0
    assert "No student writes more green tokens" in capsys.readouterr().out


def test_students_are_compared_with_innocent_ones(marked, capsys):
    few = [str(marked.folder), "--provenance"]
    assert judge.main(few) == 2
    assert "2 innocent students in these runs, 8 are needed" in capsys.readouterr().err
    more = ("name=more", "seeds=[0,1,2,3,4,5,6,7]", "controls=[baseline]", "teacher.seed=5")
    own = "recipes={own: {access: logits}}"
    assert train_tiny(marked.folder.parent, *more, own, "verdicts=[]") == 0
    capsys.readouterr()
    assert judge.main([*few, "--candidates", str(marked.folder.parent / "more")]) == 0
    printed = capsys.readouterr().out
    for candidate in ("tiny", "more", "second_teacher"):
        assert len(re.findall(rf"^(marked|plain) +{candidate} ", printed, re.MULTILINE)) == 4
    assert "among 8 innocent students" in printed or "not nearer" in printed
    assert "Nearer is not taken" in printed


def test_the_text_of_a_student_has_as_many_tokens_as_were_asked_for(marked):
    task, owner = load_task(marked.config().task), open_model(marked, "teacher")
    rows = task.rows("heldout")
    text = written(owner, task, rows, 333, seed=0)
    assert int((text.lengths - text.prompt_lengths).sum()) == 333
    again = written(owner, task, rows, 333, seed=0)
    assert np.array_equal(text.tokens, again.tokens)


def test_evidence_counts_the_completions_alone(marked):
    task, owner = load_task(marked.config().task), open_model(marked, "teacher")
    found = evidence_of(Rows.build([0, 1], [[1, 5], [1, 6, 7]], [[8, 9], [10]]), owner, task)
    assert found.tokens == 3
    with torch.no_grad():
        logits = owner(torch.tensor([[1, 5, 8]])).logits[0, :, : task.vocabulary]
    expected = -logits[1].softmax(-1).double()
    expected[8] += 1
    torch.testing.assert_close(found.surplus[5], expected, atol=1e-6, rtol=1e-5)
    assert found.surplus[7, 10] > 0.5
    assert not found.surplus[1].any()


def test_what_needs_a_watermark_says_what_is_missing(tmp_path, capsys):
    assert train_tiny(tmp_path, *MARKED) == 2
    assert "the run's own server marks its answers; it needs teacher.api" in capsys.readouterr().err
    assert train_tiny(tmp_path, API.replace(str(KEY), "12"), *MARKED) == 2
    assert "found 12, expected an odd number" in capsys.readouterr().err


def test_conclusions_say_no_more_than_was_found():
    sure, unsure = Found(100, 9.0, 1 / 401, 1e-19), Found(100, 1.0, 0.2, 0.2)
    said = meaning_of_mark({"a": [sure, sure], "b": [sure, unsure]})
    assert said.startswith("\na: with all seeds")
    assert "does not show that none" in meaning_of_mark({"b": [sure, unsure]})
    said = meaning_of_closeness({"a": [{"A"}, {"A", "B"}], "b": [{"A"}, set()]}, 8)
    assert "a: nearer to A than chance among 8" in said
    assert "b: not nearer" in said


def test_a_run_without_a_watermark_asks_for_the_key(tiny_run, capsys):
    assert judge.main([str(tiny_run), "--radioactivity"]) == 2
    assert "whose watermark? Name the key" in capsys.readouterr().err
