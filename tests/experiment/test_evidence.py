"""Evidence in the students of a run that bought marked answers."""

import json
import re

import numpy as np
import pytest
import torch
from transformers.modeling_outputs import CausalLMOutput

import eval as judge
from configs.schema import LabError, TaskConfig
from experiment.evidence import (
    add_evidence,
    corrected_for_all,
    meaning_of_closeness,
    meaning_of_mark,
    rows_of,
    written,
)
from experiment.experiment import open_model
from experiment.run import Run
from measure.watermark import Evidence, WatermarkTest
from models.rows import Rows
from tasks import load_task
from tasks.text import Text
from teacher.api.store import Store
from teacher.shards import Outputs
from teacher.watermark import Served, Watermark
from tests.helpers import train_tiny

KEY = 1_288_833_545
API = f"teacher.api={{permission: its owner, watermark_key: {KEY}, canaries: 0.4}}"
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
        text = Outputs(marked.folder / stage).rows
        z = add_evidence(Evidence(task.vocabulary), text, owner, task).z(KEY)
        assert z > 10 if "watermark" in stage else abs(z) < 4
    store = Store(marked.folder / "api.sqlite")
    names = {row["watermark"] for row in store.database.execute("SELECT watermark FROM usage")}
    assert names == {None, Watermark(KEY, task.vocabulary, 6.0).name}
    store.close()


def test_the_student_of_marked_answers_shows_the_mark_and_the_others_do_not(
    marked, tmp_path, capsys
):
    assert judge.main([str(marked.folder), "--radioactivity", "--tokens", "800"]) == 0
    printed = capsys.readouterr().out
    for name in ("marked", "plain", "baseline"):
        assert len(re.findall(rf"^{name} +1,[56]\d\d ", printed, re.MULTILINE)) == 1
    assert "The text of marked has more green tokens of this key" in printed
    key = tmp_path / "another.json"
    key.write_text('{"key": 246913577, "salt": "s"}', encoding="utf-8")
    other = ["--radioactivity", "--key", str(key), "--tokens", "800"]
    assert judge.main([str(marked.folder), *other]) == 0
    assert "No text has more green tokens of this key" in capsys.readouterr().out


def test_the_evaluation_states_what_a_defence_costs_and_prevents(marked):
    assert judge.main([str(marked.folder)]) == 0
    found = json.loads((marked.folder / "eval.json").read_text("utf-8"))["defence"]
    free, strong = found["settings"]
    assert (free["bias"], strong["bias"]) == (0.0, 6.0)
    assert free["kl_teacher_student"] == pytest.approx(0, abs=1e-6)
    assert strong["kl_teacher_student"] > 0.5
    cells = {one["bias"]: one for one in found["cells"]}
    assert cells[6.0]["damage"] == cells[6.0]["divergence"] - cells[0.0]["divergence"]
    assert min(cells[6.0]["z"]) > 4 > max(map(abs, found["z"]["baseline"]))
    page = (marked.folder / "report.html").read_text("utf-8")
    assert "What a defence costs, and prevents" in page
    assert "watermark 6" in page


def test_the_account_whose_own_key_a_student_shows_is_named(marked, capsys, monkeypatch):
    """Every account has a key of its own; here the one that asked for marked answers has KEY."""
    store = Store(marked.folder / "api.sqlite")
    rows = store.database.execute("SELECT DISTINCT account FROM usage WHERE watermark IS NOT NULL")
    (guilty,) = [row["account"] for row in rows]
    accounts = [row["id"] for row in store.accounts()]
    store.close()
    keys = {name: KEY if name == guilty else 246913577 for name in accounts}
    monkeypatch.setattr("experiment.evidence.key_of_account", lambda key, account: keys[account])
    database = ["--database", str(marked.folder / "api.sqlite"), "--tokens", "800"]
    assert judge.main([str(marked.folder), "--radioactivity", *database]) == 0
    assert re.search(rf"^marked +{guilty} ", capsys.readouterr().out, re.MULTILINE)


def test_answers_that_a_student_has_learned_name_the_account(marked, capsys):
    store = Store(marked.folder / "api.sqlite")
    (guilty,) = [row["id"] for row in store.accounts() if row["bias"] is None]
    store.close()
    assert judge.main([str(marked.folder), "--leaks"]) == 0
    line = r"^(\S+), seed \d +(sampled answers|canaries) +(acct-\w+) +\d+ +(\S+)$"
    found = re.findall(line, capsys.readouterr().out, re.MULTILINE)
    assert len(found) == 12  # three models of two seeds, two tests each
    for student, _, account, p in found:
        if student == "plain":
            assert account == guilty
            assert float(p) < 0.02
        elif student == "baseline":
            assert float(p) > 0.05
    assert judge.main([str(marked.folder), "--leaks", "--database", "nothing.sqlite"]) == 2
    assert "no database nothing.sqlite" in capsys.readouterr().err


def test_students_are_compared_with_different_innocent_ones(marked, capsys, monkeypatch):
    monkeypatch.setattr("experiment.evidence.COMPARED_TOKENS", 500)
    few = [str(marked.folder), "--provenance"]
    assert judge.main(few) == 2
    assert "2 different innocent students in these runs, 8 are" in capsys.readouterr().err
    own = "recipes={own: {access: logits}}"
    seeds = {"same": "seeds=[0,1]", "more": "seeds=[0,1,2,3,4,5,6,7]"}
    for name, number in (("same", 4), ("more", 5)):
        run = (f"name={name}", seeds[name], "controls=[baseline]", f"teacher.seed={number}")
        assert train_tiny(marked.folder.parent, *run, own, "verdicts=[]") == 0
    capsys.readouterr()
    candidates = ["--candidates", str(marked.folder.parent / "same")]
    assert judge.main([*few, *candidates]) == 2  # its baselines are the same models
    assert "2 different innocent students" in capsys.readouterr().err
    candidates = ["--candidates", str(marked.folder.parent / "more")]
    assert judge.main([*few, *candidates]) == 0
    printed = capsys.readouterr().out
    assert "innocent: 8 x baseline" in printed
    for candidate in ("tiny", "more", "second_teacher"):
        assert len(re.findall(rf"^(marked|plain) +{candidate} ", printed, re.MULTILINE)) == 4
    assert "Closeness does not show how" in printed
    for reach in ("scores", "text"):
        assert judge.main([*few, *candidates, "--reach", reach]) == 0
        other = capsys.readouterr().out
        assert "innocent: 8 x baseline" in other
        assert other != printed
    assert judge.main([*few, *candidates, "--controls", "9"]) == 2
    assert "9 are needed" in capsys.readouterr().err


def test_the_text_of_a_student_has_as_many_tokens_as_were_asked_for(marked):
    task, owner = load_task(marked.config().task), open_model(marked, "teacher")
    rows = task.rows("heldout")
    text = written(owner, task, rows, 333, seed=0)
    assert int((text.lengths - text.prompt_lengths).sum()) == 333
    again = written(owner, task, rows, 333, seed=0)
    assert np.array_equal(text.tokens, again.tokens)


def test_evidence_counts_the_completions_alone(marked):
    task, owner = load_task(marked.config().task), open_model(marked, "teacher")
    text = Rows.build([0, 1], [[1, 5], [1, 6, 7]], [[8, 9], [10]])
    found = add_evidence(Evidence(task.vocabulary), text, owner, task)
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
    taught_by_another = (
        "recipes={a: {access: text, sequences: teacher, objective: cross_entropy},"
        " b: {teachers: [a], access: logits, sequences: teacher, outputs: {watermark: 2}}}"
    )
    assert train_tiny(tmp_path, API, *MARKED, taught_by_another) == 2
    assert "the teacher's own answers are marked" in capsys.readouterr().err


@pytest.fixture(scope="module")
def small_text():
    return Text(limit=120, vocabulary=300)


def test_a_text_of_somebody_else_is_read_whole_in_the_owners_tokens(small_text):
    words = "In the beginning was a long and winding sentence without an end " * 12
    rows = rows_of([words, "x", "He said"], small_text)
    tokens = small_text.encode_answer(words)
    room = small_text.longest_row - 1
    pieces = [tokens[start : start + room] for start in range(0, len(tokens), room)]
    pieces = [*[p for p in pieces if len(p) > 1], small_text.encode_answer("He said")]
    assert [rows.row(i).tolist()[1:] for i in range(len(rows))] == pieces
    assert set(rows.prompt_lengths.tolist()) == {2}
    with pytest.raises(LabError, match="no two tokens in a row"):
        rows_of([""], small_text)
    with pytest.raises(LabError, match="cannot read a text of somebody else"):
        rows_of(["lead"], load_task(TaskConfig(name="reason", limit=100)))


class Bigrams(torch.nn.Module):
    """A model that looks at one token."""

    def __init__(self, rows, vocabulary):
        super().__init__()
        counts = torch.full((vocabulary, vocabulary), 0.01)
        for i in range(len(rows)):
            row = torch.tensor(rows.row(i).tolist())
            counts.index_put_((row[:-1], row[1:]), torch.tensor(1.0), accumulate=True)
        self.table = torch.nn.Parameter(counts.log(), requires_grad=False)

    @property
    def device(self):
        return self.table.device

    def forward(self, input_ids, logits_to_keep=0, **options):
        return CausalLMOutput(logits=self.table[input_ids][:, -logits_to_keep:])


def test_the_mark_shows_in_a_text_whose_tokens_are_unknown(small_text):
    """What a marked model wrote, known as text alone."""
    task, size = small_text, small_text.vocabulary
    model = Bigrams(task.rows("train"), size)
    zs = []
    for bias in (0.0, 4.0):
        mark = Watermark(KEY, size, bias) if bias else None
        rows = written(Served(model, mark, 1.0), task, task.rows("heldout"), 3000, seed=1)
        answers = [task.render(rows.completion(i).tolist()) for i in range(len(rows))]
        found = add_evidence(Evidence(size), rows_of(answers, task), model, task)
        zs.append(found.z(KEY))
    assert abs(zs[0]) < 4 < 8 < zs[1]


def test_a_file_is_tested_in_place_of_students(marked, tmp_path, capsys):
    file = tmp_path / "suspect.txt"
    file.write_text("L IY D", encoding="utf-8")
    command = [str(marked.folder), "--radioactivity", "--text", str(file)]
    assert judge.main(command) == 2
    assert "cannot read a text of somebody else" in capsys.readouterr().err


def test_conclusions_say_no_more_than_was_found():
    assert meaning_of_mark(["a"]).startswith("\nThe text of a has more green tokens")
    assert "does not show that nobody" in meaning_of_mark([])
    said = meaning_of_closeness({"a": [{"A"}, {"A", "B"}], "b": [{"A"}, set()]}, 8)
    assert "a: closer to A than 8 innocent students predict" in said
    assert "b: no closer" in said
    tests = {name: WatermarkTest(9, 0.0, 0.5, p) for name, p in (("a", 0.0004), ("b", 0.5))}
    assert corrected_for_all(tests) == pytest.approx({"a": 0.0008, "b": 0.5})


def test_a_run_without_a_watermark_asks_for_the_key(tiny_run, capsys):
    assert judge.main([str(tiny_run), "--radioactivity"]) == 2
    assert "the key of the watermark is needed" in capsys.readouterr().err
