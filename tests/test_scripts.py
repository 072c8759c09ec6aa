"""The real scripts, end to end, on configs/tiny.yaml; and what they say to bad input."""

import errno
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import eval as judge
import train
from experiment.check import losses_of
from experiment.run import Run
from tasks.pronounce import Pronounce

ROOT = Path(__file__).parent.parent
TINY = str(ROOT / "configs" / "tiny.yaml")


def train_tiny(runs: Path, *overrides: str) -> int:
    return train.main([TINY, *overrides, "--runs", str(runs)])


def tensor_hashes(run: Path) -> dict[str, str]:
    stages = json.loads((run / "manifest.json").read_text())["stages"]
    return {stage: entry.get("sha256") for stage, entry in stages.items()}


def test_a_run_leaves_every_file_that_the_house_promises(tiny_run):
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
            "agreement_on_teacher_errors", "nll_gap", "ece",
        }  # fmt: skip
        for metric in [*entry["fidelity"].values(), *entry["quality"].values()]:
            assert set(metric) == {"mean", "ci95", "per_seed"}


def test_transformers_loads_every_model_as_it_is(tiny_run):
    folder = tiny_run / "students" / "distilled" / "seed-0"
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    asked = tokenizer("<s> lab =", return_tensors="pt")
    assert model(**asked).logits.shape[-1] == len(tokenizer) == 72
    card = (folder / "README.md").read_text()
    teacher = tensor_hashes(tiny_run)["teacher"]
    assert "Student `distilled`" in card
    assert teacher[:16] in card
    assert "data `pronounce`" in card


def test_every_student_and_control_spends_the_budget_and_no_more(tiny_run):
    ledger = {row["stage"]: row for row in json.loads((tiny_run / "ledger.json").read_text())}
    teacher = ledger["teacher"]["flops"]
    outputs = {
        "distilled": "outputs/data-logits",
        "shuffled": "outputs/data-logits",
        "written": "outputs/teacher-text-train",
        "top": "outputs/teacher-top_k-5-train",
        "states": "outputs/teacher-hidden-1-train-300",
        "invented": "outputs/teacher-logits-invented-200",
    }
    for stage, row in ledger.items():
        if stage.startswith("students/"):
            name = stage.split("/")[1]
            spent = row["flops"] + (ledger[outputs[name]]["flops"] if name in outputs else 0)
            assert 0.55 * teacher < spent <= 0.6 * teacher, stage


def test_students_of_one_seed_start_from_the_same_weights():
    from experiment.plan import Plan
    from experiment.reading import read_config
    from models.language import build_model, initialise

    config, task = read_config(TINY), Pronounce(limit=600)
    assert {"baseline", "distilled"} <= set(Plan(config).recipes)
    models = [initialise(build_model(config.students.model, task), seed) for seed in (0, 0, 1)]
    weights = [m.model.layers[0].mlp.up_proj.weight for m in models]
    assert weights[0].equal(weights[1])
    assert not weights[0].equal(weights[2])


def test_the_same_command_on_a_finished_run_changes_nothing(tiny_run):
    before = tensor_hashes(tiny_run)
    assert train_tiny(tiny_run.parent) == 0
    assert tensor_hashes(tiny_run) == before


# Less of configs/tiny.yaml, whose stages must come out as they do there.
PART = ("seeds=[0]", "controls=[baseline,shuffled]")


def without_times(result: dict) -> dict:
    """eval.json without what a clock or the machine's load says."""
    timed = {"seconds", "joules", "money", "peak_memory_mb", "latency_ms", "answers_per_second"}
    timed |= {"environment"}

    def strip(value):
        if isinstance(value, dict):
            return {k: strip(v) for k, v in value.items() if k not in timed}
        return [strip(v) for v in value] if isinstance(value, list) else value

    return strip(result)


def kill_at_random(command: list[str], kills: int, draw: random.Random, longest: float) -> int:
    """kill -9 the command up to `kills` times at random moments, then let it finish. Returns how
    often it was killed: a machine may be done before its time is up."""
    done = 0
    while done < kills:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            assert process.wait(timeout=draw.uniform(2, longest)) == 0
            return done
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            done += 1
    assert subprocess.run(command, capture_output=True).returncode == 0
    return done


@pytest.mark.parametrize(
    ("kills", "longest"), [(5, 12), pytest.param(50, 9, marks=pytest.mark.slow)]
)
def test_killed_anywhere_the_same_command_goes_on_to_the_same_run(
    kills, longest, tiny_run, tmp_path
):
    """Teacher, outputs, students and the evaluation; what comes out equals the whole run."""
    train_it = [sys.executable, str(ROOT / "train.py"), TINY, *PART, "checkpoint_seconds=0"]
    expected = json.loads((tiny_run / "eval.json").read_text())
    draw, killed, again = random.Random(kills), 0, 0
    while killed < kills:  # a run that is done before its time is up is followed by another
        run = tmp_path / str(again) / "tiny"
        left = max(1, kills - killed - 1)
        killed += kill_at_random([*train_it, "--runs", str(run.parent)], left, draw, longest)
        assert tensor_hashes(run).items() <= tensor_hashes(tiny_run).items()
        assert len(tensor_hashes(run)) >= 10
        killed += kill_at_random([sys.executable, str(ROOT / "eval.py"), str(run)], 1, draw, 6)
        found = json.loads((run / "eval.json").read_text())
        for arm in ("distilled", "states"):
            for group in ("quality", "fidelity"):
                for name, metric in found["students"][arm][group].items():
                    there = expected["students"][arm][group][name]["per_seed"]
                    assert metric["per_seed"] == there[:1]
        again += 1


def test_the_same_command_gives_the_same_run_twice(tiny_run, tmp_path):
    """In a process of its own, where strings have other hashes."""
    fresh = {**os.environ, "PYTHONHASHSEED": "7"}
    for script, what in (
        ("train.py", [TINY, "--runs", tmp_path]),
        ("eval.py", [tmp_path / "tiny"]),
    ):
        command = [sys.executable, ROOT / script, *what]
        subprocess.run(command, env=fresh, capture_output=True, check=True)
    assert tensor_hashes(tmp_path / "tiny") == tensor_hashes(tiny_run)
    first, second = (
        without_times(json.loads((folder / "eval.json").read_text("utf-8")))
        for folder in (tiny_run, tmp_path / "tiny")
    )
    assert first == second


def kill_at_a_checkpoint(command: list[str], checkpoints: Path) -> None:
    """kill -9 the command and all its processes once a checkpoint is there."""
    started = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while started.poll() is None and not list(checkpoints.glob("step-*0.*")):
        time.sleep(0.05)
    assert started.poll() is None, "it was over before it could be killed"
    launcher = psutil.Process(started.pid)  # its processes have sessions of their own
    family = [launcher, *launcher.children(recursive=True)]
    for process in family:
        process.kill()
    psutil.wait_procs(family, timeout=10)
    started.wait()


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-5), ("float64", 1e-9)])
def test_many_processes_train_what_one_does_and_go_on_as_fewer_or_more(
    precision, tolerance, tmp_path
):
    """The same global batch on 1, on 2, from 2 to 1 and from 1 to 3 processes."""
    arguments = [
        str(ROOT / "configs" / "trace-float64.yaml"), f"precision={precision}", "teacher.epochs=2",
        "students.budget=0.5", "checkpoint_seconds=0", "threads=1",
    ]  # fmt: skip
    script = str(ROOT / "train.py")

    def command(processes: int, runs: str) -> list[str]:
        launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes"]
        launch = [*launch, str(processes)] if processes > 1 else []
        return [sys.executable, *launch, script, *arguments, "--runs", str(tmp_path / runs)]

    for runs, begun, ended in (("one", 1, 1), ("two", 2, 2), ("fewer", 2, 1), ("more", 1, 3)):
        if begun != ended:
            checkpoints = tmp_path / runs / "trace-float64" / "checkpoints" / "teacher"
            kill_at_a_checkpoint(command(begun, runs), checkpoints)
            assert list(checkpoints.glob("step-*"))
        done = subprocess.run(command(ended, runs), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    first, *others = (
        losses_of(Run.finished(tmp_path / runs / "trace-float64"))
        for runs in ("one", "two", "fewer", "more")
    )
    for trace in others:
        assert trace.keys() == first.keys()
        for stage, steps in first.items():
            assert trace[stage] == pytest.approx(steps, abs=tolerance)


def test_two_workers_side_by_side_train_the_same_models_as_one(tiny_run, tmp_path):
    recipes = (
        "recipes={distilled: {access: logits}, invented: {access: logits, sequences: teacher, "
    )
    recipes += "outputs: {prompts: invented, transfer_rows: 200}}}"
    part = ("workers=2", "seeds=[0]", "controls=[baseline,second_teacher]", "verdicts=[]", recipes)
    assert train_tiny(tmp_path, *part) == 0  # teacher and twin side by side too
    found, whole = tensor_hashes(tmp_path / "tiny"), tensor_hashes(tiny_run)
    assert len(found) == 7
    assert found.items() <= whole.items()


def test_ask_prints_every_models_answer(tiny_run, capsys):
    listed, *pronunciations = next(iter(Pronounce(limit=600).words.items()))
    assert judge.main([str(tiny_run), "--ask", "deepseek", listed]) == 0
    printed = capsys.readouterr().out
    for expected in ("deepseek", "teacher", "distilled", "baseline", "p = ", "(not listed)"):
        assert expected in printed
    assert pronunciations[0][0] in printed  # the dictionary's own answer


def test_the_report_is_one_file_that_needs_no_other(tiny_run):
    report = (tiny_run / "report.html").read_text(encoding="utf-8")
    for heading in ("Learning curves", "Fidelity against cost", "Reliability", "Dark knowledge"):
        assert heading in report
    assert "http://" not in report.replace("http://www.w3.org", "")
    assert "<script src" not in report
    assert "{{" not in report


# -- bad input: one clear line, exit code 2, nothing lost ------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["teacher.epoch=3"], "unknown key 'teacher.epoch'; did you mean 'epochs'?"),
        (["recipes.distilled.acess=text"], "did you mean 'access'?"),
        (["teacher.epochs=many"], "teacher.epochs: found 'many'"),
        (["seeds=[0, 0]"], "seeds [0, 0] repeat"),
        (["students.budget=-1"], "students.budget: found -1"),
        (["recipes.distilled.access=text"], "access 'text' reveals none"),
        (["recipes.distilled.objective=forward_lk"], "did you mean 'forward_kl'?"),
        (["recipes.distilled.objective={forward_kl: 2}"], "sum to 2, expected 1"),
        (["recipes.states.access=logits"], "are revealed by hidden alone"),
        (["recipes.states.outputs.layers=[]"], "outputs.layers names the teacher's layers"),
        (["recipes.states.outputs.layers=[2]"], "expected 1 layers, one for each of the student's"),
        (["recipes.states.objective=hidden_mse"], "leave the output layer untrained"),
        (["recipes.top.temperature=2"], "temperature other than 1 needs access logits or hidden"),
        (["students.model.hidden_size=15"], "not a multiple of num_attention_heads"),
        (["teacher.model.architecture=lama"], "'lama' is not one that transformers has"),
        (["teacher.model.settings.rope=1"], "model.settings.rope is no setting of llama"),
        (["students.budget=0.000001"], "leaves no FLOPs for training"),
        (["nonsense"], "must read key=value"),
        (["name=a/b"], "name: found 'a/b'"),
        (["task={limit: &a 3, name: *a}"], "aliases"),
        (["task=!!python/object:os.system {}"], "not plain YAML"),
        (["verdicts=[{claim: distiled beats baseline}]"], "did you mean 'distilled'?"),
        (
            ["verdicts=[{claim: distilled beats baseline, metric: words}]"],
            "task pronounce has no metric 'words'",
        ),
        (["verdicts=[{claim: distilled matches baseline}]"], "needs a threshold above 0"),
        (
            ["verdicts=[{claim: top keeps baseline, metric: sequence_agreement, threshold: 95}]"],
            "expected the share that is to be kept",
        ),
        (
            ["verdicts=[{claim: top keeps baseline, metric: word_error_rate, threshold: 0.9}]"],
            "use matches or beats",
        ),
        (["recipes.teacher={access: logits}"], "is the name of the teacher or a control"),
        (["seeds=[-1]"], "seeds.0: found -1"),
        (["teacher.training.betas=[0.9, 1.0]"], "betas.1: found 1.0"),
        (["teacher.epochs=.inf"], "teacher.epochs: found inf"),
        (["task.limit=10"], "task.limit: found 10"),
        (["students.model.hidden_size=18"], "a model of this shape cannot run"),
        (["recipes.top.outputs.k=73"], "recipes.top.outputs.k: found 73, expected at most 72"),
        (["recipes.top.outputs.k=0"], "recipes.top.outputs.k: found 0"),
        (["recipes.top.access=sampled"], "access sampled cannot serve objective reverse_kl"),
        (["recipes.top.teachers=[toop]"], "no teacher 'toop'; did you mean 'top'?"),
        (["recipes.top.teachers=[top]"], "teach each other in a circle"),
        (["recipes.top.student.initial_layers=[1]"], "has the teacher's sizes"),
        (["recipes.invented.student.on_policy=2"], "a share of the steps, at most 1"),
        (["recipes.written.student.on_policy=1"], "cannot score what the student writes"),
        (["recipes.distilled.sequences=student"], "put another recipe first"),
        (["recipes.distilled.temperature={start: 2, end: 0}"], "must stay above 0"),
        (["recipes.distilled.temperature=.nan"], "recipes.distilled.temperature"),
        (
            ["recipes.distilled.objective={forward_kl: {start: 1, end: 0, until: 0.5}}"],
            "sum to 0 at 1 of the training",
        ),
        (
            ["recipes.distilled.objective={forward_kl: {start: 1, end: 50}}"],
            "sum to 50 at 1 of the training",
        ),
        (
            [
                "recipes.distilled={access: logits, student: {on_policy: 0.5}, "
                "objective: {forward_kl: 0.5, cross_entropy: 0.5}}"
            ],
            "the text that it writes itself",
        ),
        (["teacher.training.prompt_weight=0"], "needs teacher.training.prompt_weight > 0"),
        (
            ["recipes.distilled.outputs.transfer_rows=600"],
            "the training words; with prompts: extended there is no limit",
        ),
    ],
    ids=lambda value: value[0].split("=")[0] if isinstance(value, list) else None,
)
def test_a_config_that_cannot_work_is_refused_in_one_line(overrides, said, tmp_path, capsys):
    assert train_tiny(tmp_path, *overrides) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert said in error
    assert len(error.splitlines()) == 1


def test_a_missing_config_names_the_nearest(capsys):
    assert train.main([str(ROOT / "configs" / "tinny.yaml")]) == 2
    assert "did you mean 'tiny.yaml'?" in capsys.readouterr().err


def test_a_config_that_is_not_text_is_refused(tmp_path, capsys):
    (tmp_path / "bad.yaml").write_bytes(b"name: \xff\xfe")
    assert train.main([str(tmp_path / "bad.yaml")]) == 2
    assert "is not UTF-8" in capsys.readouterr().err


def test_a_run_folder_of_another_config_is_refused_and_kept(tiny_run, capsys):
    before = tensor_hashes(tiny_run)
    assert train_tiny(tiny_run.parent, "teacher.epochs=3") == 2
    assert "teacher.epochs: 5.0 there, 3.0 here" in capsys.readouterr().err
    assert tensor_hashes(tiny_run) == before


@pytest.fixture
def copy(tiny_run, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_run, tmp_path / "tiny"))


def test_missing_and_half_written_runs_are_named(copy, tmp_path, capsys):
    assert judge.main([str(tmp_path / "nowhere")]) == 2
    assert "no run folder" in capsys.readouterr().err
    (copy / "manifest.json").write_text((copy / "manifest.json").read_text()[:100])
    assert judge.main([str(copy)]) == 2
    assert "manifest.json is damaged" in capsys.readouterr().err
    (copy / "manifest.json").unlink()
    assert judge.main([str(copy)]) == 2
    assert "no " in capsys.readouterr().err


def test_a_run_that_is_not_finished_is_not_judged(copy, capsys):
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(manifest | {"finished": None}))
    assert judge.main([str(copy)]) == 2
    assert "is not finished; run train.py" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["cut", "flip", "missing"])
def test_a_damaged_model_is_refused_by_name(damage, copy, capsys):
    file = copy / "students" / "baseline" / "seed-1" / "model.safetensors"
    content = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    else:
        content[-100] ^= 1
        file.write_bytes(content[:-60] if damage == "cut" else content)
    assert judge.main([str(copy)]) == 2
    error = capsys.readouterr().err
    assert "baseline/seed-1" in error
    assert len(error.strip().splitlines()) == 1


def test_a_student_of_another_vocabulary_is_refused(copy, capsys):
    from models.language import load_model, save_model

    folder = copy / "students" / "baseline" / "seed-0"
    model = load_model(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model.resize_token_embeddings(80)
    save_model(model, tokenizer, folder, "another")
    assert judge.main([str(copy)]) == 2
    assert "is not the model that this run trained" in capsys.readouterr().err


def test_a_damaged_output_stops_the_training_that_needs_it(copy, capsys):
    manifest = json.loads((copy / "manifest.json").read_text())
    del manifest["stages"]["students/distilled/seed-0"]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    shard = next((copy / "outputs" / "data-logits").glob("*.arrow"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert train_tiny(copy.parent) == 2
    assert "is damaged; delete" in capsys.readouterr().err


def test_the_lock_of_a_killed_process_is_taken_over(copy, capsys):
    hold = (
        "import sys, time; from experiment.run import Run\n"
        f"with Run({str(copy)!r}).locked(): print('held', flush=True); time.sleep(600)"
    )
    other = subprocess.Popen([sys.executable, "-c", hold], cwd=ROOT, stdout=subprocess.PIPE)
    assert other.stdout.readline().strip() == b"held"
    assert train_tiny(copy.parent) == 2
    error = capsys.readouterr().err
    assert f"in use by process {other.pid} on {socket.gethostname()}" in error
    other.kill()
    other.wait()
    other.stdout.close()
    assert train_tiny(copy.parent) == 0


def test_two_runs_in_one_folder_are_refused(copy, capsys):
    with Run(copy).locked():
        assert train_tiny(copy.parent) == 2
    assert f"in use by process {os.getpid()}" in capsys.readouterr().err


def test_a_write_that_fails_says_so_in_one_line_and_loses_nothing(tmp_path, capsys, monkeypatch):
    """A full disk, a read-only folder: the command goes on where it was once there is room."""
    import experiment.checkpoints

    written = []

    def full(tensors, file, metadata):
        if len(written) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
        written.append(file)
        return save_file(tensors, file, metadata)

    save_file = experiment.checkpoints.save_file
    monkeypatch.setattr(experiment.checkpoints, "save_file", full)
    assert train_tiny(tmp_path, *PART, "checkpoint_seconds=0") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert "No space left on device" in error
    assert len(list((tmp_path / "tiny" / "checkpoints" / "teacher").glob("step-*"))) == 2
    (tmp_path / "file").write_text("not a folder")
    assert train_tiny(tmp_path / "file") == 2
    assert "file" in capsys.readouterr().err


def with_files_of_at_most(limit: int, *command: str) -> str:
    """What the command says in the end when the operating system refuses to write more bytes to a
    file, as it does on a full disk; its exit code must be 2."""
    import resource

    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    return done.stderr.strip().splitlines()[-1]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit for the size of a file")
@pytest.mark.parametrize(
    ("limit", "stage", "overrides"),
    [
        (20_000, "teacher", ()),  # enough for the books, too little for a model
        (20_000, "teacher", ("workers=2", "controls=[baseline,second_teacher]", "verdicts=[]")),
        (100_000, "outputs/data-logits", ()),  # enough for models
    ],
)
def test_a_file_that_cannot_grow_any_more_is_said_in_one_line_by_the_real_script(
    limit, stage, overrides, tmp_path
):
    part = (*PART, *overrides, "recipes={distilled: {access: logits}}", "--runs", str(tmp_path))
    error = with_files_of_at_most(limit, str(ROOT / "train.py"), TINY, *part)
    assert error.startswith("error: ")
    assert "rerun the same command to resume" in error
    assert not (tmp_path / "tiny" / stage).exists() or not list(
        (tmp_path / "tiny" / stage).glob("[!.]*.arrow")
    )
    assert train_tiny(tmp_path, *part[:-2]) == 0


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit for the size of a file")
def test_an_evaluation_that_cannot_be_written_leaves_the_one_before(copy):
    before = (copy / "eval.json").read_bytes()
    error = with_files_of_at_most(8_000, str(ROOT / "eval.py"), str(copy))
    assert error.startswith("error: ")
    assert "rerun the same command to resume" in error
    assert (copy / "eval.json").read_bytes() == before


def test_a_learning_rate_that_is_far_too_high_ends_in_one_line(tmp_path, capsys):
    assert train_tiny(tmp_path, *PART, "teacher.training.learning_rate=1e30") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: teacher: ")
    assert "lower learning_rate" in error
    assert json.loads((tmp_path / "tiny/checkpoints/teacher/nonfinite.json").read_text())["rows"]


def test_a_run_that_goes_on_elsewhere_says_where_it_was(copy):
    """Or a check would expect equal bits from it."""
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["environment"]["cpu"] = "another"
    (copy / "manifest.json").write_text(json.dumps(manifest))
    shutil.rmtree(copy / "students" / "baseline" / "seed-1")
    assert train_tiny(copy.parent) == 0
    found = Run.finished(copy).manifest
    assert found["environment"]["cpu"] != "another"
    assert [e["cpu"] for e in found["earlier_environments"]] == ["another"]


def test_clocks_that_jump_change_nothing_but_the_times(tiny_run, tmp_path, monkeypatch):
    draw, clock = random.Random(0), time.perf_counter

    def jumping():
        return clock() + draw.uniform(-1e6, 1e6)

    monkeypatch.setattr(time, "perf_counter", jumping)
    monkeypatch.setattr(time, "time", jumping)
    assert train_tiny(tmp_path, *PART, "recipes={distilled: {access: logits}}") == 0
    assert tensor_hashes(tmp_path / "tiny").items() <= tensor_hashes(tiny_run).items()


def test_a_run_folder_may_be_moved(copy, tmp_path):
    moved = tmp_path / "elsewhere" / "renamed"
    moved.parent.mkdir()
    shutil.move(copy, moved)
    assert judge.main([str(moved), "--split", "validation"]) == 0


def test_a_run_of_an_older_version_is_named(copy, capsys):
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(manifest | {"schema": 0}))
    assert judge.main([str(copy)]) == 2
    assert "has schema 0, this version reads" in capsys.readouterr().err
    assert train_tiny(copy.parent) == 2
    assert "has schema 0, this version reads" in capsys.readouterr().err


def test_what_was_damaged_and_deleted_is_made_again_as_it_was(copy, tiny_run, capsys):
    """The advice that every such error gives."""
    for stage in ("teacher", "students/baseline/seed-1", "outputs/data-logits"):
        shutil.rmtree(copy / stage)
    assert train_tiny(copy.parent) == 0
    assert f"{copy / 'teacher'} is missing: it is made again" in capsys.readouterr().out
    assert tensor_hashes(copy) == tensor_hashes(tiny_run)
    assert judge.main([str(copy), "--split", "validation"]) == 0


def test_a_run_that_was_begun_on_other_rows_is_refused(copy, capsys):
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["data"]["rows"] = "0" * 64
    (copy / "manifest.json").write_text(json.dumps(manifest))
    assert train_tiny(copy.parent) == 2
    assert "begun on other rows" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("manifest.json", "[]"),
        ("manifest.json", '{"schema": 2, "finished": "yes", "stages": {"../../x": {}}}'),
        ("manifest.json", '{"schema": 2, "finished": "yes", "stages": {"/etc": {}}}'),
        ("metrics.jsonl", '{"stage": }\n'),
        ("metrics.jsonl", b"\xff\xfe}\n"),
        ("config.yaml", b"name: \xff"),
        ("config.yaml", "name: 2024-13-45"),
        ("config.yaml", "name: " + "[" * 2000),
    ],
)
def test_damaged_books_are_said_in_one_line(file, content, copy, capsys):
    content = content.encode() if isinstance(content, str) else content
    (copy / file).write_bytes(content)
    assert judge.main([str(copy)]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("what", ["folder", "file"])
def test_a_model_that_is_a_link_out_of_the_run_is_refused(what, copy, tmp_path, capsys):
    folder = copy / "students" / "baseline" / "seed-0"
    linked = folder if what == "folder" else folder / "model.safetensors"
    linked.rename(tmp_path / "elsewhere")
    linked.symlink_to(tmp_path / "elsewhere")
    assert judge.main([str(copy)]) == 2
    assert "is a link out of this run" in capsys.readouterr().err


def test_held_out_rows_count_as_read_when_the_judging_begins(copy, monkeypatch):
    before = Run(copy).reload().manifest["heldout_reads"]
    monkeypatch.setattr(
        judge, "TeacherReference", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    assert judge.main([str(copy)]) == 130
    assert Run(copy).reload().manifest["heldout_reads"] == before + 1
    assert judge.main([str(copy), "--split", "validation"]) == 130
    assert Run(copy).reload().manifest["heldout_reads"] == before + 1


@pytest.mark.parametrize("name", ["../stolen.arrow", "/etc/passwd", "link.arrow"])
def test_outputs_never_leave_their_folder(name, copy, tmp_path):
    from configs.schema import LabError
    from teacher.shards import Outputs

    folder = copy / "outputs" / "data-logits"
    provenance = json.loads((folder / "provenance.json").read_text())
    (shard, digest), *_ = provenance["shards"].items()
    shutil.copy(folder / shard, folder.parent / "stolen.arrow")
    (folder / "link.arrow").symlink_to(folder.parent / "stolen.arrow")
    provenance["shards"] = {name: digest}
    (folder / "provenance.json").write_text(json.dumps(provenance))
    with pytest.raises(LabError, match="is not a file of this folder"):
        Outputs(folder)


@pytest.mark.parametrize("kind", ["pickle", "remote code"])
def test_a_model_that_carries_code_is_refused(kind, copy, capsys):
    folder = copy / "students" / "baseline" / "seed-0"
    if kind == "pickle":
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    else:
        config = json.loads((folder / "config.json").read_text())
        config |= {"model_type": "evil", "auto_map": {"AutoModelForCausalLM": "evil.Evil"}}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "evil.py").write_text("raise SystemExit('it ran')")
    assert judge.main([str(copy)]) == 2
    error = capsys.readouterr().err.strip()
    assert "baseline/seed-0" in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("word", ["", "a" * 100_000, "\udcff"])
def test_a_word_that_no_model_can_read_is_refused_in_one_line(word, tiny_run, capsys):
    assert judge.main([str(tiny_run), "--ask", word]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert len(error) < 300


def test_ask_refuses_letters_that_it_cannot_spell(tiny_run, capsys):
    assert judge.main([str(tiny_run), "--ask", "naïve"]) == 2
    assert "'ï' is not one of the letters" in capsys.readouterr().err


def test_another_dictionary_is_named_instead_of_giving_other_rows(tmp_path):
    from configs.schema import LabError
    from tasks.pronounce import dictionary_file, read_dictionary

    other = tmp_path / "other.dict"
    other.write_bytes(dictionary_file().read_bytes() + b"zzz Z\n")
    with pytest.raises(LabError, match="another version of the dictionary"):
        read_dictionary(other)


def test_hash_of_a_file_is_not_what_identifies_a_model(tiny_run):
    """Two files of one model may differ in bytes; their tensors' hash is the same."""
    from safetensors.torch import load_file, save_file

    from models.language import sha256_of_tensors

    file = tiny_run / "teacher" / "model.safetensors"
    tensors = load_file(file)
    copy = tiny_run / "copy.safetensors"
    save_file(tensors, copy, metadata={"other": "metadata"})
    assert hashlib.sha256(copy.read_bytes()).digest() != hashlib.sha256(file.read_bytes()).digest()
    assert sha256_of_tensors(load_file(copy)) == tensor_hashes(tiny_run)["teacher"]
    copy.unlink()
