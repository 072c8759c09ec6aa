"""A blind trial, from the sealed set to its score."""

import json

import pytest

from experiment import blind
from measure.provenance import Accusation
from tests.helpers import train_tiny

RUN = ("verdicts=[]", "controls=[baseline]", "recipes={taught: {access: logits}}")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("blind")
    assert train_tiny(folder, *RUN, "name=a", "seeds=[0,1]") == 0
    assert train_tiny(folder, *RUN, "name=b", "seeds=[0,1]", "teacher.seed=5") == 0
    more = "seeds=[2,3,4,5,6,7,8,9]"
    assert train_tiny(folder, *RUN, "name=innocent", more) == 0
    return folder


@pytest.fixture
def made(runs, tmp_path, capsys):
    out = tmp_path / "set"
    assert blind.main(["make", str(runs / "a"), str(runs / "b"), "--out", str(out)]) == 0
    committed = capsys.readouterr().out.split()[-1]
    return out, committed


def test_a_student_shows_neither_its_name_nor_its_card(made):
    out, _ = made
    folders = sorted(path for path in out.iterdir() if path.is_dir())
    assert [folder.name for folder in folders] == [f"{n:02}" for n in range(1, 9)]
    for folder in folders:
        assert not (folder / "README.md").exists()
        for file in folder.iterdir():
            content = file.read_bytes()
            assert b"taught" not in content
            assert b"baseline" not in content


def test_verdicts_are_written_and_scored_against_the_sealed_labels(made, runs, capsys, monkeypatch):
    out, committed = made
    candidates = ["--candidates", str(runs / "a"), str(runs / "b")]
    innocent = ["--innocent", str(runs / "innocent")]
    read = blind.read_json

    def sealed(path, *more):
        assert path.name != blind.LABELS, "the labels were opened before the score"
        return read(path, *more)

    with monkeypatch.context() as patch:
        patch.setattr(blind, "read_json", sealed)
        assert blind.main(["examine", str(out), *candidates, *innocent]) == 0
    verdicts = json.loads((out / "verdicts.json").read_text("utf-8"))
    assert set(verdicts.values()) <= {"a", "b", "none"}
    capsys.readouterr()
    assert blind.main(["score", str(out)]) == 0
    printed = capsys.readouterr().out
    assert committed in printed
    for kind in ("taught of a", "taught of b", "baseline of none"):
        assert kind in printed


def test_right_nobody_and_wrong_are_told_apart(made, capsys):
    out, _ = made
    labels = json.loads((out / "labels.json").read_text("utf-8"))["students"]
    verdicts = {number: "a" for number in labels}
    (out / "verdicts.json").write_text(json.dumps(verdicts), encoding="utf-8")
    assert blind.main(["score", str(out)]) == 0
    lines = {" ".join(line.split()[:-3]): line.split()[-3:]
             for line in capsys.readouterr().out.splitlines()}  # fmt: skip
    assert lines["taught of a"] == ["2", "0", "0"]
    assert lines["taught of b"] == ["0", "0", "2"]
    assert lines["baseline of none"] == ["0", "0", "4"]
    del verdicts["01"]
    (out / "verdicts.json").write_text(json.dumps(verdicts), encoding="utf-8")
    assert blind.main(["score", str(out)]) == 2
    assert "no verdict on 01" in capsys.readouterr().err


def test_too_few_innocent_students_are_refused(made, runs, capsys):
    out, _ = made
    command = ["examine", str(out), "--candidates", str(runs / "a"), str(runs / "b")]
    assert blind.main([*command, "--innocent", str(runs / "a")]) == 2
    assert "2 innocent students, 8 are needed" in capsys.readouterr().err
    assert blind.main(["make", str(runs / "a"), "--out", str(out)]) == 2
    assert "exists; name another" in capsys.readouterr().err


def test_an_accusation_holds_at_its_level():
    assert Accusation("a", 9.0, 0.0009).holds
    assert not Accusation("a", 9.0, 0.002).holds
