"""An attack on the files of a run: whatever is damaged, exchanged or edited, a command refuses it
in one line, or ends in the same results; never in a traceback, never in other numbers."""

import io
import json
import random
import re
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import yaml

import eval as judge
import experiment.training_state
from configs.files import read_sealed
from tests.helpers import MODEL, tensor_hashes, train_tiny, without_times

SMALL = (
    "task.limit=200", "seeds=[0,1]", "teacher.epochs=2", "log_every=5", "checkpoint_seconds=0",
    "controls=[shuffled]", "verdicts=[{claim: a beats shuffled, metric: word_error_rate}]",
    f"students.model={json.dumps(MODEL | {'hidden_size': 16})}",
    "recipes={a: {access: logits}, "
    "b: {access: text, sequences: teacher, objective: cross_entropy}}",
)  # fmt: skip
INTERRUPTED = "students/b/seed-1"


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run, trained and evaluated."""
    runs = tmp_path_factory.mktemp("attack")
    assert train_tiny(runs, *SMALL) == 0
    assert judge.main([str(runs / "tiny")]) == 0
    return runs / "tiny"


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Path:
    """A run of the same config with another teacher."""
    runs = tmp_path_factory.mktemp("other")
    assert train_tiny(runs, *SMALL, "teacher.seed=1") == 0
    assert judge.main([str(runs / "tiny")]) == 0
    return runs / "tiny"


@pytest.fixture(scope="module")
def under_way(tmp_path_factory) -> Path:
    """The first run, stopped in its last training and in the middle of outputs."""
    runs = tmp_path_factory.mktemp("under_way")
    save, saved = experiment.training_state.checkpoint, []

    def stop_after_two(folder: Path, *rest) -> None:
        save(folder, *rest)
        saved.append(folder.name)
        if saved.count(INTERRUPTED.replace("/", "-")) == 2:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment.training_state, "checkpoint", stop_after_two)
        assert train_tiny(runs, *SMALL) == 130
    return runs / "tiny"


# -- what is done to a file ------------------------------------------------------------------------


def flip(file: Path, draw: random.Random, run: Path, other: Path) -> None:
    content = bytearray(file.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    file.write_bytes(content)


def truncate(file: Path, draw: random.Random, run: Path, other: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: draw.randrange(len(content))])


def remove(file: Path, draw: random.Random, run: Path, other: Path) -> None:
    file.unlink()


def exchange(file: Path, draw: random.Random, run: Path, other: Path) -> None:
    """With a file of the same kind: of another stage, or of another run."""
    kind = re.sub(r"[\d.].*", "", file.name)
    alike = [f for f in files_of(run) + files_of(other) if re.sub(r"[\d.].*", "", f.name) == kind]
    shutil.copy(draw.choice([f for f in alike if f != file] or [file]), file)


def add(file: Path, draw: random.Random, run: Path, other: Path) -> None:
    """A copy under another name, as a synchronising client leaves it."""
    shutil.copy(file, file.with_name(f"{file.stem} (copy){file.suffix}"))


def edit(file: Path, draw: random.Random, run: Path, other: Path) -> None:
    """One value, of the same type; a bit of a file that is not text."""
    if file.suffix not in (".json", ".yaml", ".jsonl"):
        return flip(file, draw, run, other)
    text = file.read_text("utf-8")
    if file.suffix == ".jsonl":
        lines = [json.loads(line) for line in text.splitlines()]
        change(draw.choice(lines), draw)
        file.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
        return None
    content = yaml.safe_load(text) if file.suffix == ".yaml" else json.loads(text)
    change(content, draw)
    dump = yaml.safe_dump if file.suffix == ".yaml" else json.dumps
    file.write_text(dump(content), "utf-8")
    return None


def change(content: dict | list, draw: random.Random) -> None:
    """Change one random leaf, or remove it."""
    keys = list(content) if isinstance(content, dict) else list(range(len(content)))
    if not keys:
        return
    key = draw.choice(keys)
    value = content[key]
    if isinstance(value, dict | list) and value:
        change(value, draw)
    elif draw.random() < 0.2:
        del content[key]
    elif isinstance(value, bool) or value is None:
        content[key] = not value
    elif isinstance(value, int | float):
        content[key] = value + 1 if draw.random() < 0.5 else type(value)(value * 1.25)
    elif isinstance(value, str):
        content[key] = value[:-1] + chr(ord(value[-1]) ^ 1) if value else "x"
    else:
        content[key] = {"x": 1}


ATTACKS = (flip, truncate, remove, exchange, add, edit, edit)


def files_of(run: Path) -> list[Path]:
    return sorted(f for f in run.rglob("*") if f.is_file() and f.stat().st_size)


# -- what a command then does ----------------------------------------------------------------------


def run_command(main: Callable, *arguments: str) -> tuple[int, str, str]:
    """(exit code, standard output, standard error)."""
    out, error = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.TextIOWrapper(io.BytesIO(), "utf-8")
    with redirect_stdout(out), redirect_stderr(error):
        code = main(list(arguments))
    texts = []
    for stream in (out, error):
        stream.seek(0)
        texts.append(stream.read())
    return code, *texts


def training_of(run: Path) -> dict:
    """What a run trained: hashes and FLOPs."""
    ledger = json.loads((run / "ledger.json").read_text("utf-8"))
    return {"models": tensor_hashes(run), "flops": {r["stage"]: r["flops"] for r in ledger}}


def trained(run: Path) -> tuple[int, str, str, object]:
    done = run_command(lambda a: train_tiny(run.parent, *SMALL), "")
    return *done, None if done[0] else training_of(run)


def evaluated(run: Path) -> tuple[int, str, str, object]:
    done = run_command(judge.main, str(run))
    return *done, None if done[0] else without_times(read_sealed(run / "eval.json"))


def validated(run: Path) -> tuple[int, str, str, object]:
    done = run_command(judge.main, str(run), "--split", "validation")
    return *done, re.sub(r"\d+ minutes.*", "", done[1])


def asked(run: Path) -> tuple[int, str, str, object]:
    done = run_command(judge.main, str(run), "--ask", "lab")
    return *done, done[1]


def checked(run: Path) -> tuple[int, str, str, object]:
    done = run_command(judge.main, str(run), "--check")
    return *done, done[1].splitlines()[-4:]  # before them, perhaps, a new evaluation


def selfchecked(run: Path) -> tuple[int, str, str, object]:
    done = run_command(judge.main, str(run), "--selfcheck")
    return *done, re.sub(r"\(\d+ s\)", "", done[1])


COMMANDS = (trained, evaluated, asked, checked, selfchecked)
COUNTS = [10, pytest.param(86, marks=pytest.mark.slow)]  # times seven tests, six of them fast


def attack(command: Callable, run: Path, other: Path, place: Path, count: int) -> None:
    """Attack `count` copies of a run; every outcome must be a refusal or harmless."""
    place.mkdir()
    clean = Path(shutil.copytree(run, place / "clean" / "tiny"))
    normal, _, _, expected = command(clean)
    refused, wrong = 0, []
    for case in range(count):
        draw = random.Random(f"{command.__name__} {run.parent.name[:5]} {count} {case}")
        copy = Path(shutil.copytree(run, place / str(case) / "tiny"))
        kinds: dict[str, list[Path]] = {}
        for file in files_of(copy):
            kind = re.sub(r"[0-9a-f]{16}|\d+", "#", str(file.relative_to(copy)))
            kinds.setdefault(kind, []).append(file)
        file, what = draw.choice(kinds[draw.choice(sorted(kinds))]), draw.choice(ATTACKS)
        name = f"case {case}: {what.__name__} {file.relative_to(copy)}"
        what(file, draw, copy, other)
        try:
            code, output, error, found = command(copy)
        except Exception as problem:
            wrong.append(f"{name}: {type(problem).__name__}: {problem}")
            continue
        if code == 2:
            refused += 1
            if not re.fullmatch(r"error: [^\n]+\n", error):
                wrong.append(f"{name}: {error}")
        elif (code, found) != (normal, expected):
            wrong.append(f"{name}: exit code {code} and other results: {output[-300:]}{error}")
        shutil.rmtree(copy.parent)
    assert not wrong, "\n".join(wrong)
    assert refused >= count // 50  # some commands read few files


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize(
    "command",
    [*COMMANDS, pytest.param(validated, marks=pytest.mark.slow)],
    ids=lambda c: c.__name__,
)
def test_a_finished_run(command, count, finished, other, tmp_path, monkeypatch):
    results = tmp_path / "results"
    results.mkdir()
    shutil.copy(finished / "eval.json", results / "tiny.json")
    monkeypatch.setattr(judge, "RESULTS", results)
    attack(command, finished, other, tmp_path / "runs", count)


@pytest.mark.parametrize("count", COUNTS)
def test_a_run_under_way(count, under_way, other, finished, tmp_path):
    """Stopped in the middle of a training; the same command ends in the same run."""
    attack(trained, under_way, other, tmp_path / "runs", count)
