"""The task `pronounce`: the dictionary and the questions that it rejects."""

import numpy as np
import pytest
from rapidfuzz.distance import Levenshtein

import eval as judge
from configs.schema import LabError
from tasks.pronounce import (
    LETTERS,
    LONG,
    LONGEST_PROMPT,
    Pronounce,
    one_edit_away,
    split_of,
)


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


def test_a_word_may_be_invented_unless_it_is_evaluated():
    task = Pronounce(limit=3000)
    answer = [task.token_ids["AH"], task.token_ids["B"], task.end]
    new = [f"zq{first}{second}x" for first in "aeiou" for second in "aeiou"]
    assert not task.words.keys() & {*new}
    assert {split_of(word) for word in new} >= {"train", "heldout"}  # says nothing of new words
    for word in (*task.by_split["train"][:20], *new):
        row = np.array([*task.prompt(word), *answer])
        assert task.invented_prompt_length(row) == len(word) + 2, word
    for word in (*task.by_split["heldout"][:20], *task.by_split["validation"][:20], "a" * LONG):
        assert task.invented_prompt_length(np.array([*task.prompt(word), *answer])) is None, word


def test_the_question_of_a_row_is_its_word():
    task = Pronounce(limit=500)
    rows = task.rows("validation")
    words = [task.by_id[int(row)] for row in rows.ids]
    assert [task.question(rows, i) for i in range(len(rows))] == words


def test_a_prompt_has_one_to_thirty_letters():
    task = Pronounce(limit=100)
    assert len(task.prompt("a")) == 3
    assert len(task.prompt("a" * 30)) == LONGEST_PROMPT == 32
    for word in ("", "a" * 31):
        with pytest.raises(LabError, match=f"has {len(word)} letters, expected 1 to 30"):
            task.prompt(word)
    with pytest.raises(LabError, match=r"^'a{20}\.\.\.' has 50 letters"):
        task.prompt("a" * 50)
    with pytest.raises(LabError, match=r"^'a{49}' has 49 letters"):
        task.prompt("a" * 49)


def test_words_one_edit_away_are_those_and_no_others():
    words = set(one_edit_away("cat"))
    assert {"cat", "at", "ct", "ca", "bat", "cot", "cab", "cats", "scat", "chat"} <= words
    assert {word for word in words if len(word) == 2} == {"at", "ct", "ca"}
    assert len({word for word in words if len(word) == 3}) == 1 + 3 * (len(LETTERS) - 1)
    assert not {"c", "a", "t", "dog", "catss", "tac"} & words
