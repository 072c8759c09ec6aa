"""The task `pronounce`: the dictionary and the questions that it rejects."""

import pytest
from rapidfuzz.distance import Levenshtein

import eval as judge
from tasks.pronounce import Pronounce


@pytest.mark.parametrize("word", ["", "a" * 100_000, "\udcff"])
def test_a_word_that_no_model_can_read_is_rejected_in_one_line(word, tiny_run, capsys):
    assert judge.main([str(tiny_run), "--ask", word]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert len(error) < 300


def test_unknown_letters_are_rejected_by_ask(tiny_run, capsys):
    assert judge.main([str(tiny_run), "--ask", "naïve"]) == 2
    assert "'ï' is not one of the letters" in capsys.readouterr().err


def test_another_dictionary_is_rejected_by_name(tmp_path):
    from configs.schema import LabError
    from tasks.pronounce import dictionary_file, read_dictionary

    other = tmp_path / "other.dict"
    other.write_bytes(dictionary_file().read_bytes() + b"zzz Z\n")
    with pytest.raises(LabError, match="expected 20b5c293"):
        read_dictionary(other)


def test_far_words_are_two_edits_and_more_from_every_training_word():
    task = Pronounce(limit=3000)
    rows = task.rows("heldout")
    columns = task.grade(rows.ids, ["AH"] * len(rows))
    training = task.by_split["train"]
    for i, word_id in enumerate(rows.ids):
        word = task.by_id[int(word_id)]
        nearest = min(Levenshtein.distance(word, other, score_cutoff=1) for other in training)
        assert columns["far"][i] == (nearest >= 2), word
    assert 0 < columns["far"].sum() < len(rows)
    assert columns["wrong_far"].tolist() == (columns["far"] * columns["wrong"]).tolist()
