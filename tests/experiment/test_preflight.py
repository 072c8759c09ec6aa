"""Checks before anything is trained."""

from accelerate import Accelerator

from experiment.experiment import open_experiment
from experiment.preflight import check_models
from experiment.reading import read_config
from experiment.run import Run
from tests.helpers import TINY


def printed_for(hidden_size, tmp_path, capsys) -> str:
    config = read_config(TINY, [f"students.model.hidden_size={hidden_size}"])
    run = Run.open(tmp_path / str(hidden_size), config, {})
    check_models(open_experiment(config, run, Accelerator(cpu=True)))
    return capsys.readouterr().out


def test_a_student_larger_than_its_teacher_is_noted(tmp_path, capsys):
    for size in (8, 64):
        (tmp_path / str(size)).mkdir()
    assert "note:" not in printed_for(8, tmp_path, capsys)
    note = printed_for(64, tmp_path, capsys)
    assert "parameters, more than the teacher's" in note
    assert note.startswith("note: students of recipe distilled have ")
