"""The real eval.py, on the run of configs/tiny.yaml."""

import json

import eval as judge
from experiment.reading import read_config
from experiment.run import Run
from tasks.pronounce import Pronounce
from tests.helpers import TINY

READ = read_config(TINY)


def test_a_finished_run_has_every_file_and_key(tiny_run):
    for name in ("config.yaml", "manifest.json", "metrics.jsonl", "ledger.json"):
        assert (tiny_run / name).stat().st_size > 0
    assert (tiny_run / "outputs" / "data-logits" / "provenance.json").exists()
    assert not (tiny_run / "checkpoints").exists() or not any((tiny_run / "checkpoints").iterdir())
    result = json.loads((tiny_run / "eval.json").read_text())
    assert set(result) >= {
        "schema", "config", "seeds", "teacher", "students", "controls", "cost", "verdicts",
        "environment",
    }  # fmt: skip
    assert set(result["students"]) == {"distilled", "written", "top", "states", "invented"}
    assert set(result["controls"]) == {
        "baseline",
        "low_data",
        "shuffled",
        "smoothed",
        "second_teacher",
    }
    for entry in [*result["students"].values(), *result["controls"].values()]:
        assert set(entry) >= {"params", "recipe", "quality", "fidelity", "cost", "long"}
        assert set(entry["fidelity"]) == {
            "kl_teacher_student", "kl_student_teacher", "top1_agreement", "sequence_agreement",
            "agreement_on_teacher_errors", "nll_gap", "ece", "ece_if_calibrated",
        }  # fmt: skip
        for metric in [*entry["fidelity"].values(), *entry["quality"].values()]:
            assert set(metric) == {"mean", "ci95", "per_seed"}


def test_ask_prints_every_models_answer(tiny_run, capsys):
    listed, *pronunciations = next(iter(Pronounce(limit=600).words.items()))
    assert judge.main([str(tiny_run), "--ask", "deepseek", listed]) == 0
    printed = capsys.readouterr().out
    assert "deepseek (not in the data)\n" in printed
    assert f"{listed} (seen in training)\n" in printed
    models = [line.split("|")[1].strip() for line in printed.splitlines() if line[:2] == "| "]
    asked = ["", "right answer", "teacher", *READ.recipes, "baseline"]
    assert models == 2 * asked
    assert pronunciations[0][0] in printed  # the dictionary's own answer
    assert printed.endswith("p: the probability that a model gives to its whole answer\n")


def test_ask_takes_held_out_questions_by_default(tiny_run, capsys):
    assert judge.main([str(tiny_run), "--ask"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("(heldout, not seen in training)\n") == 6
    assert printed.count("| right answer |") == 6
    task = Pronounce(limit=600)
    rows = task.rows("heldout")
    assert f"\n{task.question(rows, len(rows) // 2)} (" in printed


def test_a_run_is_found_by_its_name_and_behind_the_questions(copy, tmp_path, monkeypatch, capsys):
    (tmp_path / "runs").mkdir()
    copy.rename(tmp_path / "runs" / "tiny")
    monkeypatch.chdir(tmp_path)
    for arguments in (["tiny", "--ask", "distill"], ["--ask", "distill", "runs/tiny"]):
        assert judge.main(arguments) == 0
        assert "teacher" in capsys.readouterr().out


def test_held_out_rows_count_as_read_when_the_evaluation_begins(copy, monkeypatch):
    before = Run(copy).reload().manifest["heldout_reads"]
    monkeypatch.setattr(
        judge, "teacher_references", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    assert judge.main([str(copy)]) == 130
    assert Run(copy).reload().manifest["heldout_reads"] == before + 1
    assert judge.main([str(copy), "--split", "validation"]) == 130
    assert Run(copy).reload().manifest["heldout_reads"] == before + 1


def test_figures_of_the_validation_split_are_never_committed(tiny_run, capsys):
    assert judge.main([str(tiny_run), "--split", "validation", "--update"]) == 2
    assert "results/ holds held-out figures; remove --split" in capsys.readouterr().err


def test_the_first_read_of_the_held_out_split_is_the_first(lab):
    assert "heldout_reads" not in lab.run.manifest
    judge.count_read(lab.run)
    assert Run(lab.run.folder).reload().manifest["heldout_reads"] == 1
