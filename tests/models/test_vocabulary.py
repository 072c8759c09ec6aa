"""Vocabularies: the same ids must mean the same tokens."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

import eval as judge
import train
from configs.schema import LabError, Model, Recipe
from experiment.cost import CountedForward
from experiment.experiment import open_experiment, outputs_of, teacher_of
from experiment.reading import read_config
from experiment.run import Run
from measure.evaluate import TeacherReference
from measure.reasoning import thinking_curve, voting_curve
from models.language import Averaged, build_model, initialise, load_model, sha256_of_files
from models.rows import collate
from student.on_policy import OnPolicy
from tasks.pronounce import Pronounce
from tasks.reason import Reason
from teacher.source import LocalModel
from tests.helpers import MODEL, TINY


def test_a_student_with_another_vocabulary_is_rejected(copy, capsys):
    from models.language import save_model

    folder = copy / "students" / "baseline" / "seed-0"
    model = load_model(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model.resize_token_embeddings(80)
    save_model(model, tokenizer, folder, "another")
    assert judge.main([str(copy)]) == 2
    assert "is not the model that this run trained" in capsys.readouterr().err


def renamed(folder, swap):
    """A copy of a saved tokenizer in which two tokens have each other's ids."""
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text("utf-8"))
    words = content["model"]["vocab"]
    a, b = swap
    words[a], words[b] = words[b], words[a]
    file.write_text(json.dumps(content), "utf-8")


def test_ids_that_mean_other_tokens_are_rejected(methods_run, tmp_path):
    """Both have 72 tokens: a cut to the same width would notice nothing."""
    folder = Path(shutil.copytree(methods_run.folder, tmp_path / "methods"))
    renamed(folder / "teacher", ("AA", "AE"))
    lab = open_experiment(methods_run.config(), Run(folder).reload())
    # as if the teacher had been trained with it
    lab.run.manifest["stages"]["teacher"]["files"] = sha256_of_files(folder / "teacher")
    message = "id 33 is 'AE' and 'AA'.*access text, or objective uld"
    with pytest.raises(LabError, match=message):
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


class Padded(torch.nn.Linear):
    """The head of a model, with three more outcomes, each of which it prefers to all others."""

    def __init__(self, head):
        outcomes, width = head.weight.shape
        super().__init__(width, outcomes + 3)
        with torch.no_grad():
            self.weight.copy_(torch.cat([head.weight, torch.zeros(3, width)]))
            self.bias.copy_(torch.tensor([0.0] * outcomes + [1000.0] * 3))


PRONOUNCE, REASON = Pronounce(limit=300), Reason(limit=300)


def written_by(model, rows):
    recipe = Recipe(access="logits", sequences="student", objective="forward_kl")
    policy = OnPolicy(
        rows, CountedForward(model), None, CountedForward, recipe, 0, 8, 20, 2, PRONOUNCE.vocabulary
    )
    written = policy.written(model, step=3)
    batch = collate(written.rows, np.arange(len(written.rows)), 0)
    return [written.rows.tokens, written.signal(batch).log_probs]


def compared_by(model, rows):
    evaluation = TeacherReference(model, PRONOUNCE, rows).evaluate(model)
    return [evaluation.answers.log_probs, *evaluation.columns.values()]


def answers_of_source(answers):
    return [part for row in answers for part in (row.tokens, row.log_probs)]


USES = {
    "scoring": lambda model, rows: answers_of_source(LocalModel(model, PRONOUNCE).score(rows)),
    "answering": lambda model, rows: answers_of_source(
        LocalModel(model, PRONOUNCE).answer(rows, 1.0, True, torch.Generator())
    ),
    "inventing": lambda model, rows: answers_of_source(
        LocalModel(model, PRONOUNCE).invent(5, 1.0, True, torch.Generator(), set())
    ),
    "writing to be scored": written_by,
    "evaluating": compared_by,
    "averaging": lambda model, rows: answers_of_source(
        LocalModel(Averaged([model, model], PRONOUNCE.vocabulary), PRONOUNCE).score(rows)
    ),
}


@pytest.mark.parametrize("use", USES)
def test_what_pads_the_matrices_of_a_model_is_never_an_outcome(use, tiny_run):
    rows, found = PRONOUNCE.rows("train").take(np.arange(12)), []
    for padded in (False, True):
        model = load_model(tiny_run / "teacher")
        if padded:
            model.lm_head = Padded(model.lm_head)
            assert int(model(torch.tensor([[1]])).logits.argmax()) >= PRONOUNCE.vocabulary
        found.append([np.asarray(part) for part in USES[use](model, rows)])
    for part, other in zip(*found, strict=True):
        np.testing.assert_allclose(part, other, rtol=1e-5, atol=1e-6)


def test_what_pads_the_matrices_of_a_model_is_no_vote():
    model = initialise(build_model(Model(**MODEL), REASON), 0).eval()
    rows, found = REASON.rows("heldout").take(np.arange(2)), []
    for padded in (False, True):
        if padded:
            model.lm_head = Padded(model.lm_head)
        counted = CountedForward(model)
        found.append(
            (thinking_curve(counted, REASON, rows), voting_curve(counted, REASON, rows, 0))
        )
    for curve, other in zip(*found, strict=True):
        assert [p["tokens_per_problem"] for p in curve] == [p["tokens_per_problem"] for p in other]
