"""The rules of the house: which room may know which, and what none may do."""

import ast
import re
import sys
from pathlib import Path

import pytest

from configs.reading import read_config

ROOT = Path(__file__).parent.parent
ROOMS = ("configs", "tasks", "teacher", "student", "measure")
SOURCES = [
    ROOT / "train.py",
    ROOT / "eval.py",
    *(f for r in ROOMS for f in (ROOT / r).glob("*.py")),
]
NEVER = {
    "configs": {"tasks", "teacher", "student", "measure", "train", "eval"},
    "tasks": {"teacher", "student", "measure", "train", "eval"},
    "teacher": {"student", "measure", "train", "eval"},
    "student": {"measure", "train", "eval"},
    "measure": {"train", "eval"},
}


def imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    return found


@pytest.mark.parametrize("file", SOURCES, ids=lambda f: str(f.relative_to(ROOT)))
def test_arrows_point_downward_and_nothing_is_unpickled(file):
    tops = {name.split(".")[0] for name in imports(file)}
    assert not tops & {"pickle", "dill", "joblib"}
    assert "torch.load" not in file.read_text(encoding="utf-8")
    assert not tops & NEVER.get(file.parent.name, set())


@pytest.mark.parametrize(
    "name", ["student/objectives.py", "teacher/signal.py", "measure/fidelity.py"]
)
def test_objectives_and_measures_need_torch_alone(name):
    allowed = {"torch", "teacher", *sys.stdlib_module_names}
    assert {i.split(".")[0] for i in imports(ROOT / name)} <= allowed
    assert {i for i in imports(ROOT / name) if i.startswith("teacher")} <= {"teacher.signal"}


def test_weights_change_in_one_place():
    steps = [f.name for f in SOURCES if re.search(r"optimizer\.step\(\)", f.read_text("utf-8"))]
    assert steps == ["train.py"]


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda f: f.name)
def test_every_config_reads_and_says_how_long_it_takes(file):
    config = read_config(file)
    assert config.name == file.stem
    comment = "".join(
        line for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("#")
    )
    assert re.search(r"\d+ (seconds|minutes)", comment)


def test_commands_in_the_readme_exist():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for script, config in re.findall(r"python (train|eval)\.py (configs/\S+\.yaml)", readme):
        assert script == "train"
        assert (ROOT / config).exists()
    targets = set(re.findall(r"^make (\S+)", readme, re.MULTILINE))
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert targets >= {"demo", "test"}
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_the_lock_pins_every_direct_dependency():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    lock = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in lock.splitlines()}
    assert {re.match(r"[\w-]+", w)[0].lower() for w in wanted} <= pinned
    assert "torch==2.13.0" in lock.splitlines()


@pytest.mark.parametrize("file", SOURCES, ids=lambda f: str(f.relative_to(ROOT)))
def test_durations_come_from_a_clock_that_never_jumps(file):
    assert not re.search(r"\btime\.time\(|datetime\.now\(\)", file.read_text(encoding="utf-8"))
