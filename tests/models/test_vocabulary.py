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
from configs.schema import LabError, Recipe
from experiment.cost import CountedForward
from experiment.experiment import open_experiment, outputs_of, teacher_of
from experiment.reading import read_config
from experiment.run import Run
from models.language import load_model, sha256_of_files
from models.rows import collate
from tests.helpers import TINY


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
