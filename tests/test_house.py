"""Rules for the code: which folder may import which, and what is not allowed anywhere."""

import ast
import os
import re
import sys
from pathlib import Path

import pytest

from experiment.environment import PACKAGES
from experiment.reading import read_config
from measure.metrics import METRICS
from student.objectives import OBJECTIVES
from tasks import TASKS
from teacher.access import ACCESS
from tests.helpers import ROOT

FOLDERS = ("configs", "models", "tasks", "teacher", "measure", "student", "experiment")
SOURCES = [
    ROOT / "train.py",
    ROOT / "eval.py",
    *(f for d in FOLDERS for f in (ROOT / d).rglob("*.py")),
]
TOP = {"train", "eval", "labs"}
# A command, as train.py and eval.py are, which opens runs; it is imported by nobody.
SELLER = ROOT / "teacher" / "api" / "__main__.py"
ABOVE = {  # what each folder must not import
    "configs": TOP | {"models", "tasks", "teacher", "measure", "student", "experiment"},
    "models": TOP | {"tasks", "teacher", "measure", "student", "experiment"},
    "tasks": TOP | {"teacher", "measure", "student", "experiment"},
    "teacher": TOP | {"measure", "student", "experiment"},
    "measure": TOP | {"student", "experiment"},
    "student": TOP | {"measure", "experiment"},
    "experiment": TOP,
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
    folder = file.relative_to(ROOT).parts[0]
    assert "teacher.api.__main__" not in imports(file)
    if file != SELLER:
        assert not tops & ABOVE.get(folder, set())


@pytest.mark.parametrize(
    "name", ["student/objectives.py", "teacher/signal.py", "measure/fidelity.py"]
)
def test_objectives_and_fidelity_import_only_torch(name):
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
    extras = project["optional-dependencies"]
    _, *test = extras["test"]  # the first names other extras
    wanted = [*project["dependencies"], *extras["api"], *extras["course"], *test]
    lock = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in lock.splitlines()}
    assert {re.match(r"[\w-]+", w)[0].lower() for w in wanted} <= pinned
    assert "torch==2.13.0" in lock.splitlines()


def test_uv_installs_the_same_versions_of_what_decides_results():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    pins = project["tool"]["uv"]["constraint-dependencies"]
    assert {pin.split("==")[0].replace("-", "_") for pin in pins} == set(PACKAGES)
    assert set(pins) <= set((ROOT / "constraints.txt").read_text("utf-8").splitlines())


@pytest.mark.parametrize("file", SOURCES, ids=lambda f: str(f.relative_to(ROOT)))
def test_durations_come_from_a_clock_that_never_jumps(file):
    assert not re.search(r"\btime\.time\(|datetime\.now\(\)", file.read_text(encoding="utf-8"))


@pytest.mark.parametrize("file", SOURCES, ids=lambda f: str(f.relative_to(ROOT)))
def test_no_source_line_names_a_task_or_a_metric_outside_its_folder(file):
    """Docstrings and comments may give examples. `text` is also an access level."""
    if file.relative_to(ROOT).parts[0] == "tasks" or file.name == "metrics.py":
        return
    defaults = {"pronounce", "sequence_agreement"} if file.name == "schema.py" else set()
    names = (TASKS.keys() | METRICS.keys()) - defaults - ACCESS.keys()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            assert node.value not in names, f"line {node.lineno}: {node.value}"


@pytest.mark.parametrize("file", SOURCES, ids=lambda f: str(f.relative_to(ROOT)))
@pytest.mark.parametrize(
    ("table", "homes"),
    [
        (ACCESS, {"teacher/access.py"}),
        (OBJECTIVES, {"student/objectives.py"}),
    ],
    ids=["access", "objectives"],
)
def test_no_line_branches_on_one_access_level_or_objective_outside_its_table(table, homes, file):
    """Adding an entry would have to edit every such comparison."""
    if str(file.relative_to(ROOT).as_posix()) in homes:
        return
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Compare):
            for part in ast.walk(node):
                named = isinstance(part, ast.Constant) and part.value in table
                ambiguous = isinstance(part, ast.Constant) and part.value in ("none", "text")
                assert not named or ambiguous, f"line {node.lineno}: {part.value!r}"


@pytest.mark.xdist_group("house")
def test_groups_of_tests_reach_the_workers(request):
    """Otherwise every worker trains the runs of a group, as with pytest 9.2 and xdist 3.8."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        assert request.node.nodeid.endswith("@house")


def test_no_two_files_of_tests_have_the_same_name():
    """pytest imports them by it."""
    names = [file.name for file in (ROOT / "tests").rglob("test_*.py")]
    assert len(names) == len(set(names))
