"""The task `gsm8k`: its files, its grader, and pretrained models from end to end."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import eval as judge
import train
from configs.schema import LabError, Model
from experiment.experiment import open_experiment, outputs_of, teacher_task
from experiment.run import Run
from models.language import build_model, initialise, save_model
from models.rows import Rows, collate
from student.training_set import without_reasoning
from tasks.gsm8k import Gsm8k, final_number, read_problems
from teacher.source import retokenised
from tests.helpers import ROOT, task_with

CONFIG = str(ROOT / "configs" / "gsm8k.yaml")
REAL = ROOT.parent / "shared" / "data" / "gsm8k"
real_files = pytest.mark.skipif(not REAL.is_dir(), reason=f"no GSM8K files in {REAL}")


def made_up(count):
    """Problems of the published form."""
    return [
        {
            "question": f"Tom has {n} red and {n + 3} blue marbles. How many has he?",
            "answer": f"He has {n}+{n + 3}=<<{n}+{n + 3}={2 * n + 3}>>{2 * n + 3} marbles.\n"
            f"#### {2 * n + 3}",
        }
        for n in range(count)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """train.jsonl, test.jsonl and three untrained models, one with another tokenizer."""
    place = tmp_path_factory.mktemp("gsm8k")
    problems = made_up(150)
    for split, part in (("train", problems[:120]), ("test", problems[120:])):
        lines = "".join(json.dumps(problem) + "\n" for problem in part)
        (place / f"{split}.jsonl").write_text(lines, "utf-8")
    texts = [p["question"] + p["answer"] for p in problems]
    tokenizer, other = trained_tokenizer(texts, 400), trained_tokenizer(texts, 300)
    for name, width, tokens in (
        ("large", 32, tokenizer), ("small", 16, tokenizer), ("stranger", 32, other)
    ):  # fmt: skip
        shape = Model(hidden_size=width, num_hidden_layers=1, num_attention_heads=2)
        model = initialise(build_model(shape, task_with(tokens, 1024)), 0)
        save_model(model, tokens, place / name, "a model of a test")
    return place


def trained_tokenizer(texts, size):
    """Byte-level BPE with `size` tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="</s>", bos_token="</s>", pad_token="</s>"
    )


def test_a_solution_ends_with_its_number():
    assert final_number("so 3 + 4 = 7.\n#### 1,234") == 1234
    assert final_number("#### -2.50 dollars") == -2.5
    assert final_number("it is 5, no, 18.") == 18
    assert final_number("no number") is None
    assert final_number("7\n####") == 7
    assert final_number("####") is None
    assert final_number("#### 18 ####") == 18
    assert final_number("#### 20 + 5 = 25") == 25
    assert final_number("#### 10-3=7") == 7
    assert final_number("The answer is (12)-3") == 3
    assert final_number("#### .5") == 0.5
    assert final_number("#### 18\nIs it 19?") == 18


def test_problems_become_rows_and_are_graded_by_their_last_number(folder):
    task = Gsm8k(tokenizer=str(folder / "large"), folder=str(folder))
    assert len(task.rows("heldout")) == 30
    assert len(task.rows("train")) + len(task.rows("validation")) == 120
    rows = task.rows("heldout")
    solution = task.render(rows.completion(4).tolist())
    assert solution == "He has 124+127=251 marbles.\n#### 251"
    assert task.truths(task.question(rows, 4)) == [solution]
    assert all(task.is_right(rows, i) for i in range(30))
    answers = [task.render(rows.completion(i).tolist()) for i in range(30)]
    answers[0], answers[1] = "I do not know", "#### 7"
    assert task.grade(rows.ids, answers)["right"].tolist() == [0, 0, *[1] * 28]
    assert task.agree(["no"], ["no"])["same_answer"].tolist() == [0]
    answered = without_reasoning(rows, task)
    assert task.render(answered.completion(4).tolist()) == "#### 251"
    assert all(task.is_right(answered, i) for i in range(30))
    boxed = task.tokenizer("First, 2+3=5. So it is 5.")["input_ids"]
    assert task.render(task.without_reasoning(boxed)) == "#### 5"  # without ####, still no trace
    assert task.without_reasoning(task.tokenizer("I do not know")["input_ids"]) == []
    ends = rows.completion(4).tolist()
    unended = Rows.build([int(rows.ids[4])] * 2, [[1], [1]], [ends, ends[:-1]])
    assert [task.is_right(unended, i) for i in (0, 1)] == [True, False]


@real_files
def test_the_published_files_load_and_every_solution_is_graded_right(folder):
    problems = {split: read_problems(str(REAL), split) for split in ("train", "test")}
    assert (len(problems["train"]), len(problems["test"])) == (7473, 1319)
    task = Gsm8k(tokenizer=str(folder / "large"), folder=str(REAL))
    truths = [final_number(p["answer"]) for part in problems.values() for p in part]
    assert None not in truths
    held = task.by_split["heldout"]
    ids = np.array([task.id_of(problem) for problem in held])
    assert task.grade(ids, [task.solution(p) for p in held])["right"].all()
    assert not any("<<" in task.solution(problem) for problem in held)
    questions = {split: {p["question"] for p in part} for split, part in task.by_split.items()}
    assert not questions["train"] & (questions["validation"] | questions["heldout"])
    assert 0.03 < len(questions["validation"]) / 7473 < 0.07


def test_files_that_are_not_gsm8k_are_rejected_in_one_line(tmp_path):
    with pytest.raises(LabError, match=r"no file .*train\.jsonl"):
        read_problems(str(tmp_path), "train")
    (tmp_path / "train.jsonl").write_text('{"question": "2 + 2?", "answer": "#### 4"}\n{"a": 1}\n')
    with pytest.raises(LabError, match="line 2: expected an object with question and answer"):
        read_problems(str(tmp_path), "train")
    (tmp_path / "test.jsonl").write_text("\n")
    with pytest.raises(LabError, match="is empty; expected a problem on every line"):
        read_problems(str(tmp_path), "test")


def test_without_a_folder_the_problems_come_from_the_hub(monkeypatch):
    def load_dataset(*arguments, **options):
        assert (arguments, options) == (("openai/gsm8k", "main"), {"split": "test"})
        return made_up(2)

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert read_problems(None, "test") == made_up(2)
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: 1 / 0)
    with pytest.raises(LabError, match=r"cannot be loaded from the hub .*name it in task\.folder"):
        read_problems(None, "test")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": "Why? " * 3000}, "a question of [0-9]+ tokens, expected at most"),
        ({"answer": "1 " * 600 + "#### 1"}, "a solution of 1?[0-9]{3} tokens, expected fewer"),
    ],
)
def test_problems_too_long_for_a_row_are_rejected_by_their_question(
    change, message, folder, tmp_path
):
    for split in ("train", "test"):
        problems = [made_up(1)[0] | change, *made_up(12)[1:]]
        lines = "".join(json.dumps(problem) + "\n" for problem in problems)
        (tmp_path / f"{split}.jsonl").write_text(lines, "utf-8")
    task = Gsm8k(folder=str(tmp_path), tokenizer=str(folder / "small"))
    with pytest.raises(LabError, match=message):
        task.rows("heldout")


def test_a_tokenizer_without_an_end_or_a_pad_mark(folder, tmp_path):
    """Without an end an answer could not end; padding is never looked at, so any mark does."""
    for mark in ("eos", "pad"):
        changed = Path(shutil.copytree(folder / "small", tmp_path / mark))
        settings = json.loads((changed / "tokenizer_config.json").read_text("utf-8"))
        settings.pop(f"{mark}_token")
        (changed / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
    with pytest.raises(LabError, match="has no EOS token: an answer could not end"):
        Gsm8k(folder=str(folder), tokenizer=str(tmp_path / "eos"))
    assert Gsm8k(folder=str(folder), tokenizer=str(tmp_path / "pad")).pad is not None
    with pytest.raises(LabError, match=r"task\.tokenizer .*nowhere' cannot be loaded"):
        Gsm8k(folder=str(folder), tokenizer=str(tmp_path / "nowhere"))


@pytest.mark.slow
def test_pretrained_models_run_the_whole_story(folder, tmp_path, capsys):
    """configs/gsm8k.yaml itself, with test models instead of those of the hub."""
    overrides = [
        f"task={{name: gsm8k, tokenizer: {folder / 'large'}, folder: {folder}}}",
        f"teacher.model={{pretrained: {folder / 'large'}}}",
        f"students.model={{pretrained: {folder / 'small'}}}",
        "students.tflops=0.02", "threads=1",
    ]  # fmt: skip
    assert train.main([CONFIG, *overrides, "--runs", str(tmp_path)]) == 2
    assert "no row" in capsys.readouterr().err  # an untrained teacher has no right trace
    traces = "{traces: {access: text, sequences: teacher, objective: cross_entropy}}"
    claim = "{claim: traces beats baseline, metric: accuracy}"
    overrides += ["name=known", f"recipes={traces}", f"verdicts=[{claim}]"]
    assert train.main([CONFIG, *overrides, "--runs", str(tmp_path)]) == 0
    assert judge.main([str(tmp_path / "known")]) == 0
    run = Run.finished(tmp_path / "known")
    assert run.cost_of("teacher")["flops"] == run.cost_of("teacher")["steps"] == 0
    for name in ("traces", "baseline"):
        spent = run.cost_of(f"students/{name}/seed-0")["flops"]
        spent += run.cost_of("outputs/teacher-text-train")["flops"] if name == "traces" else 0
        assert 0.8 * 0.02e12 < spent <= 0.02e12
    result = json.loads((run.folder / "eval.json").read_text("utf-8"))
    assert set(result["students"]["traces"]["quality"]) == {"accuracy"}
    assert "answer_agreement" in result["students"]["traces"]["fidelity"]
    assert result["cost"]["fraction_of_teacher"]["flops"] is None
    assert "of the FLOPs of training" not in (run.folder / "report.html").read_text("utf-8")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("students.tflops=null", "set both or neither"),
        ("students.budget=0.1", "set one of budget and tflops"),
        ("teacher.model.hidden_size=16", "has its own sizes: remove hidden_size"),
        ("controls=[baseline,second_teacher]", "remove it"),
        ("task.tokenizer=null", "task.tokenizer: missing"),
        ("recipes.right.student.initial_layers=[1]", "can be copied only if"),
        ("teacher.model={architecture: llama}", "hidden_size is missing"),
    ],
)
def test_a_pretrained_model_that_cannot_be_used_is_rejected_in_one_line(
    override, message, tmp_path, capsys
):
    assert train.main([CONFIG, override, "--runs", str(tmp_path)]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1


def strangers(folder, *recipes):
    return [
        "name=strangers", "threads=1", "students.tflops=0.006", "controls=[baseline]",
        f"task={{name: gsm8k, tokenizer: {folder / 'small'}, folder: {folder}}}",
        f"teacher.model={{pretrained: {folder / 'stranger'}}}",
        f"students.model={{pretrained: {folder / 'small'}}}",
        f"recipes={{{', '.join(recipes)}}}",
        "verdicts=[{claim: text beats baseline, metric: accuracy}]",
    ]  # fmt: skip


TEXT = (
    "text: {access: text, sequences: teacher, objective: cross_entropy, "
    "outputs: {transfer_rows: 12, temperature: 1}}"
)
SORTED = (
    "sorted: {access: logits, sequences: teacher, outputs: {transfer_rows: 12}, "
    "objective: {cross_entropy: 0.5, uld: 0.5}}"
)


def test_a_teacher_with_other_tokens_teaches_by_text_and_by_sorted_probabilities(
    folder, tmp_path, capsys, monkeypatch
):
    """From the config to the report: its text is re-encoded with the student's tokenizer."""
    monkeypatch.setattr(Gsm8k, "longest_answer", 10)
    arguments = [CONFIG, *strangers(folder, TEXT, SORTED), "--runs", str(tmp_path)]
    assert train.main(arguments) == 0
    assert judge.main([str(tmp_path / "strangers")]) == 0
    run = Run.finished(tmp_path / "strangers")
    config = run.config()
    lab = open_experiment(config, run)
    own = teacher_task(config, run, lab.task)
    assert len(own.tokenizer) == 300 < len(lab.task.tokenizer) == 400
    for name in ("text", "sorted"):
        stored = outputs_of(lab, config.recipes[name])
        answers = [
            lab.task.render(stored.rows.completion(i).tolist()) for i in range(len(stored.rows))
        ]
        assert any(answers) or name == "sorted"  # the likeliest token may be the end
        for i in range(12):
            asked = lab.task.prompt(lab.task.question(stored.rows, i))
            assert stored.rows.prompt(i).tolist() == asked
    signal = stored.signal(collate(stored.rows, np.arange(12), 0))
    assert signal.log_probs.shape == (len(signal.targets), 300)
    sums = signal.log_probs.float().exp().sum(-1)
    torch.testing.assert_close(sums, torch.ones(len(sums)), atol=1e-2, rtol=0)
    result = json.loads((run.folder / "eval.json").read_text("utf-8"))
    assert "kl_teacher_student" not in result["students"]["text"]["fidelity"]
    assert {"sequence_agreement", "answer_agreement"} <= {*result["students"]["text"]["fidelity"]}
    assert judge.main([str(run.folder), "--selfcheck"]) == 0
    output = capsys.readouterr().out
    assert "12 of 12 answers equal when rewritten" in output
    assert judge.main([str(run.folder), "--ask", "How many?"]) == 0


def test_retokenised_outputs_are_paired_by_position():
    class Words:
        def __init__(self, size):
            self.size = size
            self.end = 0

        def render(self, tokens):
            return "".join(chr(96 + t) * self.size for t in tokens if t)

        def encode_answer(self, text):
            return [ord(text[i]) - 96 for i in range(0, len(text), self.size)]

    own, task, log_probs = Words(2), Words(1), torch.arange(3.0)[:, None]
    ids, beside = retokenised(own, task, np.array([5, 6, 0]), log_probs)
    assert ids.tolist() == [5, 5, 6, 6, 0]
    assert beside[:, 0].tolist() == [0, 1, 2, 2, 2]
    ids, beside = retokenised(task, own, np.array([5, 5, 6, 6]), torch.arange(4.0)[:, None])
    assert ids.tolist() == [5, 6]  # truncated: no EOS
    assert beside[:, 0].tolist() == [0, 1]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["recipes.kl={access: logits, sequences: teacher}"], "Use access text, or"),
        (
            ["recipes.kl={access: top_k, sequences: teacher}"],
            "access top_k: teacher and student have different vocabularies",
        ),
        (
            ["recipes.kl={access: logits, sequences: student, objective: uld}"],
            "Use access text, or",
        ),
        (["verdicts=[{claim: text beats baseline, metric: ece}]"], "choose another metric"),
        (
            ["teacher.epochs=1", "students.tflops=null", "students.budget=1"],
            "the teacher unchanged",
        ),
    ],
)
def test_access_that_needs_the_same_tokens_is_rejected_for_other_tokenizers(
    overrides, message, folder, tmp_path, capsys
):
    arguments = [CONFIG, *strangers(folder, TEXT), *overrides, "--runs", str(tmp_path)]
    assert train.main(arguments) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "strangers" / "config.yaml").exists()


def test_a_student_has_the_tokens_of_its_task(folder, tmp_path, capsys):
    overrides = strangers(folder, TEXT)
    overrides += [f"students.model={{pretrained: {folder / 'stranger'}}}"]
    assert train.main([CONFIG, *overrides, "--runs", str(tmp_path)]) == 2
    assert "must use its task's tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["pickled weights", "code of a model", "code of a tokenizer"])
def test_pretrained_folders_run_no_code_of_theirs(what, folder, tmp_path, capsys):
    model = Path(shutil.copytree(folder / "large", tmp_path / "model"))
    (model / "evil.py").write_text("raise SystemExit('it ran')")
    if what == "pickled weights":
        torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
        (model / "model.safetensors").unlink()
    else:
        file = model / ("config.json" if "model" in what else "tokenizer_config.json")
        settings = json.loads(file.read_text("utf-8"))
        classes = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
        settings |= {"model_type": "evil", "auto_map": classes}
        if "tokenizer" in what:
            settings |= {
                "tokenizer_class": "Evil",
                "auto_map": {"AutoTokenizer": ["evil.Evil"] * 2},
            }
        file.write_text(json.dumps(settings), "utf-8")
    tokenizer = model if "tokenizer" in what else folder / "large"
    overrides = [
        f"task={{name: gsm8k, tokenizer: {tokenizer}, folder: {folder}}}",
        f"teacher.model={{pretrained: {model}}}",
        f"students.model={{pretrained: {folder / 'small'}}}",
    ]
    assert train.main([CONFIG, *overrides, "--runs", str(tmp_path)]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert str(model) in error
    assert len(error.splitlines()) == 1


def test_a_missing_pretrained_model_is_one_line(folder, tmp_path, capsys):
    overrides = [
        f"task={{name: gsm8k, tokenizer: {folder / 'large'}, folder: {folder}}}",
        f"teacher.model={{pretrained: {tmp_path / 'nowhere'}}}",
    ]
    assert train.main([CONFIG, *overrides, "--runs", str(tmp_path)]) == 2
    error = capsys.readouterr().err.strip()
    assert "cannot be loaded" in error
    assert len(error.splitlines()) == 1


def test_a_number_is_read_as_people_write_it():
    assert final_number("#### \u22127") == -7  # a typeset minus sign
    assert final_number("#### 1e3") == 1000
    assert final_number("#### 18\nQuestion: 2 + 2?\n#### 4") == 18  # a run-on answer
    assert final_number("#### 18 #### 4") == 18


def test_lines_of_jsonl_end_at_newlines_alone(tmp_path):
    """JSON allows the other line breaks of Unicode inside a string; editors add a BOM."""
    problems = made_up(3)
    problems[1]["question"] += " a\u2028b\u2029c\u0085d"
    lines = "\n".join(json.dumps(problem, ensure_ascii=False) for problem in problems)
    (tmp_path / "train.jsonl").write_text("\ufeff" + lines + "\n\n", "utf-8")
    assert read_problems(str(tmp_path), "train") == problems


def write_problems(folder, place, train_, test):
    for split, problems in (("train", train_), ("test", test)):
        lines = "".join(json.dumps(problem) + "\n" for problem in problems)
        (place / f"{split}.jsonl").write_text(lines, "utf-8")
    return Gsm8k(tokenizer=str(folder / "small"), folder=str(place))


def test_answers_without_a_number_are_rejected_by_name(folder, tmp_path):
    """Otherwise any answer without a number would be right."""
    problems = made_up(20)
    problems[3]["answer"] = "yes"
    with pytest.raises(LabError, match="no number in the answer 'yes' to the question 'Tom has 3"):
        write_problems(folder, tmp_path, problems[:10], problems[10:]).rows("train")


def test_five_of_a_hundred_training_problems_are_for_validation(folder, tmp_path):
    """The same ones everywhere: by a hash of the question."""
    found = write_problems(folder, tmp_path, made_up(400), made_up(410)[400:]).by_split
    assert [len(found[split]) for split in ("train", "validation", "heldout")] == [384, 16, 10]


def test_every_question_is_asked_once(folder, tmp_path, capsys):
    """Tested questions do not train; one with two answers is dropped everywhere."""
    problems = made_up(30)
    contradiction = problems[25] | {"answer": "#### 1"}
    train_ = [*problems[:20], problems[0], problems[21], contradiction]
    task = write_problems(folder, tmp_path, train_, problems[20:])
    splits = task.by_split
    questions = {split: [p["question"] for p in part] for split, part in splits.items()}
    trained = questions["train"] + questions["validation"]
    assert sorted(trained) == sorted(p["question"] for p in problems[:20])
    kept = [*problems[20:25], *problems[26:]]
    assert questions["heldout"] == [p["question"] for p in kept]
    assert "4 problems are dropped" in capsys.readouterr().out


def test_the_date_in_a_chat_template_never_changes(folder, tmp_path):
    """Otherwise the rows of a run would be others the next day."""
    shutil.copytree(folder / "small", tmp_path / "small")
    template = "{{ strftime_now('%Y') }} {{ strftime_now( \"%d\" ) }} {{ messages[0]['content'] }}"
    (tmp_path / "small" / "chat_template.jinja").write_text(template, "utf-8")
    task = Gsm8k(tokenizer=str(tmp_path / "small"), folder=str(folder))
    assert task.tokenizer.decode(task.prompt("How many?")).startswith("2025 01 How many?")


def test_the_prompt_of_a_chat_template_ends_where_the_answer_begins(folder, tmp_path):
    shutil.copytree(folder / "small", tmp_path / "small")
    template = "{{ messages[0]['content'] }}{% if add_generation_prompt %} says:{% endif %}"
    (tmp_path / "small" / "chat_template.jinja").write_text(template, "utf-8")
    task = Gsm8k(tokenizer=str(tmp_path / "small"), folder=str(folder))
    assert task.tokenizer.decode(task.prompt("How many?")).endswith(" says:")


def test_an_end_mark_that_a_tokenizer_appends_does_not_end_the_prompt(folder):
    task = Gsm8k(tokenizer=str(folder / "small"), folder=str(folder))
    from tokenizers.processors import TemplateProcessing

    end = task.tokenizer.eos_token
    task.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, task.tokenizer.eos_token_id)]
    )
    assert task.tokenizer("marbles")["input_ids"][-1] == task.tokenizer.eos_token_id
    assert task.prompt("How many?")[-1] != task.tokenizer.eos_token_id


def test_a_chat_template_that_does_not_end_is_rejected(folder, tmp_path, monkeypatch):
    shutil.copytree(folder / "small", tmp_path / "small")
    loops = "{% for a in range(9999) %}{% for b in range(99) %}{% endfor %}{% endfor %}"
    (tmp_path / "small" / "chat_template.jinja").write_text(loops, "utf-8")
    monkeypatch.setattr("tasks.tokenizers.CHAT_SECONDS", 0.01)
    with pytest.raises(LabError, match=r"its chat template takes longer than 0\.01 s"):
        Gsm8k(tokenizer=str(tmp_path / "small"), folder=str(folder))
