"""The task `instruct`: prompts with answers, chats, and prompts that a teacher answers."""

import csv
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import eval as judge
import train
from configs.schema import LabError, Model
from experiment import vocabulary
from experiment.run import Run
from models.language import build_language_model, initialise, save_model
from tasks.examples import Exchange, exchanges_of
from tasks.instruct import Instruct
from tasks.text import train_tokenizer
from tests.serving import SHAPE

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ANIMALS = "fox crow hen goat owl bear hare frog".split()
THINGS = "river kite lamp boat drum clock well bridge hat map bell key".split()
PAIRS = [(a, b) for a in ANIMALS for b in THINGS]


def asked(pair):
    return "Tell a tale of a {} and a {}.".format(*pair)


def told(pair):
    return "Once a {0} found a {1}. The {0} kept the {1}.".format(*pair)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A pretrained folder with a chat template, prompts, and documents."""
    folder = tmp_path_factory.mktemp("chat")
    texts = [asked(p) + told(p) for p in PAIRS]
    tokenizer = train_tokenizer(texts * 3, 340)
    tokenizer.chat_template = TEMPLATE
    model = build_language_model(Model(initializer_range=0.3, **SHAPE), tokenizer, 128)
    save_model(initialise(model, 0), tokenizer, folder / "model", "a card")
    lines(folder / "prompts.jsonl", [{"prompt": asked(p)} for p in PAIRS])
    draw = np.random.Generator(np.random.PCG64(0))
    documents = [" ".join(draw.choice([*ANIMALS, *THINGS, "the", "and"], 30)) for _ in range(60)]
    lines(folder / "documents.jsonl", [{"text": text} for text in documents])
    return folder


def lines(file, records):
    file.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return file


def task_of(place, file, **settings):
    return Instruct(
        path=str(file), tokenizer=str(place / "model"), row_tokens=96, answer_tokens=40, **settings
    )


def pairs(count=None):
    return [{"prompt": asked(p), "completion": told(p)} for p in PAIRS[:count]]


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_prompts_with_answers_are_rows_whatever_the_file(ending, place, tmp_path):
    file, records = tmp_path / f"pairs.{ending}", pairs()
    renamed = [{"question": r["prompt"], "reply": r["completion"], "n": 1} for r in records]
    if ending == "jsonl":
        lines(file, renamed)
    elif ending == "csv":
        with open(file, "w", encoding="utf-8-sig", newline="") as out:
            writer = csv.DictWriter(out, renamed[0])
            writer.writeheader()
            writer.writerows(renamed)
    else:
        pq.write_table(pa.Table.from_pylist(renamed), file)
    task = task_of(place, file, columns={"prompt": "question", "completion": "reply"})
    found = {}
    for split in ("train", "validation", "heldout"):
        rows = task.rows(split)
        for i in range(len(rows)):
            assert rows.completion(i)[-1] == task.end
            found[task.question(rows, i)] = task.render(rows.completion(i))
    assert found == {r["prompt"]: r["completion"] for r in records}
    assert not task.unanswered
    heldout = task.rows("heldout")
    question = task.question(heldout, 0)
    assert task.truths(question) == [found[question]]
    shown = task.tokenizer.decode(task.prompt("Why?"))
    assert shown == "<|user|>Why?\n<|assistant|>"


def test_every_turn_of_the_assistant_is_an_answer_to_all_before_it():
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "A?"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "B?"},
        {"role": "assistant", "content": "b"},
    ]
    system, first, answer, second, _ = [(m["role"], m["content"]) for m in messages]
    assert exchanges_of({"messages": messages}, {}) == [
        Exchange((system, first), "a"),
        Exchange((system, first, answer, second), "b"),
    ]
    assert exchanges_of({"messages": messages[:2]}, {}) == [Exchange((system, first), None)]
    assert exchanges_of({"talk": messages[:3]}, {"messages": "talk"}) == [
        Exchange((system, first), "a")
    ]


def test_what_a_text_says_is_no_special_token(place, tmp_path):
    records = pairs()
    records[0]["completion"] = "an end </s> that is text"
    task = task_of(place, lines(tmp_path / "a.jsonl", records))
    found = [
        task.render(rows.completion(i))
        for rows in map(task.rows, ("train", "validation", "heldout"))
        for i in range(len(rows))
    ]
    assert "an end </s> that is text" in found


def test_few_malformed_records_are_left_out_and_named(place, tmp_path, capsys):
    file = lines(tmp_path / "a.jsonl", [*pairs(), *pairs()])
    content = file.read_text("utf-8").splitlines()
    content[4] = "{"
    file.write_text("\n".join(content), "utf-8")
    task = task_of(place, file)
    assert sum(len(task.rows(s)) for s in ("train", "validation", "heldout")) == len(PAIRS)
    note = capsys.readouterr().out
    assert "note: 1 of 192 records are malformed and left out, first" in note
    assert "a.jsonl, line 5: found no JSON" in note
    content[7] = '{"prompt": 7}'
    file.write_text("\n".join(content), "utf-8")
    with pytest.raises(LabError, match="2 of 192 records are malformed, more than 1%; the first"):
        task_of(place, file)


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({"question": "a"}, "expected a string 'prompt', found question"),
        ([1], "found list, expected an object"),
        ({"prompt": "a\ud800"}, "half of a surrogate pair"),
        ({"messages": []}, "expected a list of messages in 'messages'"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "expected messages with a role"),
        ({"messages": [{"role": "user", "content": None}]}, "a text as content"),
        ({"messages": [{"role": "system", "content": "a"}]}, "no message has an answer"),
    ],
)
def test_a_record_that_is_no_exchange_says_what_is_missing(record, problem):
    with pytest.raises(ValueError, match=problem):
        exchanges_of(record, {})


def test_prompts_are_all_answered_or_none(place, tmp_path):
    records = [*pairs(90), {"prompt": "And?"}]
    with pytest.raises(LabError, match="1 of 91 prompts have no answer; expected all or none"):
        task_of(place, lines(tmp_path / "a.jsonl", records))
    documents = str(place / "documents.jsonl")
    with pytest.raises(LabError, match=r"task\.documents: the prompts have answers"):
        task_of(place, lines(tmp_path / "b.jsonl", pairs()), documents=documents)


def test_what_does_not_fit_a_row_is_left_out_and_counted(place, tmp_path, capsys):
    records = pairs()
    records[0]["completion"] = told(PAIRS[0]) * 9
    task = task_of(place, lines(tmp_path / "a.jsonl", records))
    assert sum(len(task.rows(s)) for s in ("train", "validation", "heldout")) == len(PAIRS) - 1
    assert "note: 1 of " in capsys.readouterr().out


CONFIG = """
name: tales
task: {name: instruct, path: PLACE/prompts.jsonl, documents: PLACE/documents.jsonl,
  tokenizer: PLACE/model, vocabulary: 300, row_tokens: 96, answer_tokens: 40}
seeds: [0]
threads: 1
teacher:
  model: {pretrained: PLACE/model, dtype: bfloat16, attention: sdpa}
  published: {source: a test, parameters: 1.0e+6, tokens: 1.0e+9, licence: MIT,
    allows_distillation: yes}
students:
  model: {hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, initializer_range: 0.2}
  training: {batch_rows: 16, learning_rate: 0.01}
  tflops: 0.02
recipes:
  text: {access: text, sequences: teacher, objective: cross_entropy, outputs: {temperature: 1}}
  top_k: {access: top_k, sequences: teacher, outputs: {temperature: 1, k: 20}}
  own: {access: logits, sequences: student, objective: reverse_kl}
controls: [baseline, shuffled]
verdicts:
  - {claim: text beats baseline, metric: bits_per_byte}
  - {claim: top_k beats text, metric: kl_teacher_student}
"""


@pytest.fixture(scope="module")
def told_run(place, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    config = folder / "tales.yaml"
    config.write_text(CONFIG.replace("PLACE", str(place)), encoding="utf-8")
    assert train.main([str(config), "--runs", str(folder)]) == 0
    assert judge.main([str(folder / "tales")]) == 0
    return Run.finished(folder / "tales")


def test_a_teacher_answers_prompts_and_students_are_compared_with_it(told_run, place):
    result = json.loads((told_run.folder / "eval.json").read_text("utf-8"))
    for name in ("text", "top_k", "own"):
        found = result["students"][name]
        assert found["fidelity"]["kl_teacher_student"]["mean"] > 0
        assert found["quality"]["bits_per_byte"]["mean"] > 0
    assert result["teacher"]["quality"]["bits_per_byte"]["mean"] > 0
    assert [v["result"] for v in result["verdicts"]]
    stage = told_run.manifest["stages"]["outputs/teacher-text-heldout-temperature-1"]
    assert 0 < stage["rows"] < 0.2 * len(PAIRS)
    assert result["cost"]["published"] == {"flops": 6e15, "source": "a test"}
    report = (told_run.folder / "report.html").read_text("utf-8")
    assert "published as 6e+15 FLOPs (a test), and was not measured here" in report
    outside = told_run.cost_of("outputs/teacher-text-train-temperature-1")["probability_outside"]
    assert 0.01 < outside < 0.5


def test_the_saved_student_answers_in_its_own_smaller_vocabulary(told_run):
    folder = told_run.folder / "students" / "top_k" / "seed-0"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert len(tokenizer) == model.config.vocab_size <= 300
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": asked(PAIRS[0])}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer = model.generate(**prompt, max_new_tokens=5, do_sample=False)
    assert answer.shape[1] > prompt["input_ids"].shape[1]
    card = (folder / "README.md").read_text("utf-8")
    assert "The licence of its teacher: MIT (a test); allows distillation: yes" in card


def test_the_tokens_that_a_teacher_uses_make_a_vocabulary(place, tmp_path, capsys):
    config, out = tmp_path / "tales.yaml", tmp_path / "tales.tokens"
    config.write_text(CONFIG.replace("PLACE", str(place)), encoding="utf-8")
    assert vocabulary.main([str(config), "--rows", "20", "--out", str(out)]) == 0
    assert "that it wrote, are in" in capsys.readouterr().out
    task = task_of(place, place / "prompts.jsonl", vocabulary=str(out))
    whole = task_of(place, place / "prompts.jsonl")
    assert len(task.tokenizer) < len(whole.tokenizer)
    assert {*out.read_text("utf-8").split()} <= task.tokenizer.get_vocab().keys()
    for question in (asked(PAIRS[0]), asked(PAIRS[50])):
        assert task.tokenizer.tokenize(question) == whole.tokenizer.tokenize(question)
    with pytest.raises(LabError, match=r"task\.vocabulary: no file .*nothing; python -m"):
        task_of(place, place / "prompts.jsonl", vocabulary=str(tmp_path / "nothing"))


def test_it_can_be_asked_checked_and_resumed(told_run, capsys):
    assert judge.main([str(told_run.folder), "--ask", "Tell a tale."]) == 0
    assert "top_k" in capsys.readouterr().out
    assert judge.main([str(told_run.folder), "--selfcheck"]) == 0
    config = told_run.folder.parent / "tales.yaml"
    before = told_run.manifest["stages"]
    assert train.main([str(config), "--runs", str(told_run.folder.parent)]) == 0
    assert Run.finished(told_run.folder).manifest["stages"] == before


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (", documents: PLACE/documents.jsonl", "", "baseline learns from the data's own answers"),
        ("[baseline, shuffled]", "[baseline, gold]", "gold learns from the data's own answers"),
        ("tokenizer: PLACE/model, ", "", "task.tokenizer: missing"),
        ("answer_tokens: 40", "answer_tokens: 96", "leaves none of 96 row_tokens for the prompt"),
        ("path: PLACE/prompts.jsonl", "limit: 90", "path: set one of path and dataset"),
    ],
)
def test_a_config_that_cannot_work_is_rejected_in_one_line(
    old, new, message, place, tmp_path, capsys
):
    file = tmp_path / "tales.yaml"
    assert old in CONFIG
    file.write_text(CONFIG.replace(old, new).replace("PLACE", str(place)), encoding="utf-8")
    assert train.main([str(file), "--runs", str(tmp_path)]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1
