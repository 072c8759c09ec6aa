"""Plant a few hundred generated single-point changes and print the share that the tests notice.

    make mutants-wide              # 200 changes
    python -m tests.mutants_wide --count 40 --only measure

The changes are those of cosmic-ray, and two more: a keyword argument or a statement removed. Each
is planted in a copy of the project, in which the tests nearest to its module run until one fails;
the whole suite may notice more. A change with which nothing can be imported says nothing about the
tests and is left out of the share.
"""

import argparse
import ast
import io
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import Queue
from tempfile import TemporaryDirectory

# Imported once, before each change forks: a process that imports them itself takes seconds longer.
import accelerate  # noqa: F401
import datasets  # noqa: F401
import hypothesis  # noqa: F401
import jinja2  # noqa: F401
import matplotlib.pyplot  # noqa: F401
import numpy  # noqa: F401
import pytest
import rich.console  # noqa: F401
import scipy.optimize
import scipy.stats  # noqa: F401
import tokenizers  # noqa: F401
import torch
import torch.utils.flop_counter
import transformers  # noqa: F401
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator

ROOT = Path(__file__).parent.parent
HAND_MADE = "tests/test_hand_made_run.py"
TRAIN = "tests/test_train.py"
SETTINGS = "tests/test_settings.py"
RECOUNT = "tests/experiment/test_recount.py"
OBJECTIVES = "tests/student/test_objectives.py"
HIDDEN = "tests/student/test_hidden.py"
OUTPUTS = "tests/teacher/test_outputs.py"
GRADED = "tests/tasks/test_graded.py"
SET = "tests/student/test_training_set.py"
ON_POLICY = "tests/student/test_on_policy.py"
RESUME = "tests/experiment/test_resume.py"
CHECKPOINTS = "tests/experiment/test_checkpoints.py"
STAGES = "tests/experiment/test_stages.py"
PRONOUNCE = "tests/tasks/test_pronounce.py"
REASON = "tests/tasks/test_reason.py"
GSM8K = "tests/tasks/test_gsm8k.py"
METRICS = "tests/measure/test_metrics.py"
STATISTICS = "tests/measure/test_statistics.py"
VERDICTS = "tests/measure/test_verdicts.py"
PLAN = "tests/experiment/test_plan.py"
RESULT = "tests/experiment/test_result.py"
REFERENCE = "tests/experiment/test_reference.py"
CHUNKED = "tests/student/test_chunked.py"
# The modules that decide results: the tests that run, nearest first.
MODULES = {
    "models/rows.py": ["tests/models/test_rows.py", SET, OBJECTIVES, HAND_MADE, TRAIN, OUTPUTS],
    "models/generate.py": [
        "tests/models/test_end_marks.py", OUTPUTS, PRONOUNCE, ON_POLICY, REASON,
    ],
    "models/language.py": ["tests/models", TRAIN],
    "tasks/pronounce.py": [REFERENCE, METRICS, PRONOUNCE, GRADED, TRAIN],
    "tasks/reason.py": [METRICS, GRADED, REASON],
    "tasks/gsm8k.py": [METRICS, GRADED, GSM8K],
    "tasks/digits.py": [REFERENCE, METRICS, GRADED, "tests/tasks/test_digits.py"],
    "tasks/text.py": [METRICS, GRADED, "tests/tasks/test_text.py"],
    "teacher/signal.py": [OBJECTIVES, "tests/teacher", HAND_MADE],
    "teacher/access.py": ["tests/teacher", OBJECTIVES, TRAIN, "tests/experiment/test_selfcheck.py"],
    "teacher/source.py": ["tests/teacher", OBJECTIVES, TRAIN, GSM8K],
    "teacher/outputs.py": ["tests/teacher", TRAIN],
    "teacher/shards.py": ["tests/teacher", TRAIN],
    "measure/metrics.py": [METRICS, "tests/measure/test_fidelity.py", HAND_MADE],
    "measure/fidelity.py": ["tests/measure/test_fidelity.py", HAND_MADE],
    "measure/statistics.py": [STATISTICS, VERDICTS, "tests/measure/test_laws.py", HAND_MADE],
    "measure/verdicts.py": [VERDICTS, HAND_MADE],
    "measure/evaluate.py": [HAND_MADE, GRADED, "tests/test_eval.py"],
    "measure/reasoning.py": [REASON],
    "measure/laws.py": ["tests/measure/test_laws.py"],
    "measure/savings.py": ["tests/measure/test_savings.py"],
    "experiment/tuning.py": ["tests/experiment/test_tuning.py"],
    "experiment/tries.py": ["tests/experiment/test_tuning.py"],
    "measure/report/tables.py": [
        "tests/measure/report/test_tables.py", "tests/measure/test_savings.py", HAND_MADE,
    ],
    "student/objectives.py": [OBJECTIVES, HIDDEN, CHUNKED, TRAIN],
    "student/hidden.py": [HIDDEN, RECOUNT],
    "student/loss.py": [OBJECTIVES, CHUNKED, HIDDEN, TRAIN, SETTINGS],
    "student/chunked.py": [CHUNKED],
    "student/training_set.py": [SET, TRAIN, OBJECTIVES],
    "student/on_policy.py": [ON_POLICY, RECOUNT],
    "student/recipe.py": [OBJECTIVES, PLAN, "tests/experiment/test_rules.py", SETTINGS],
    "experiment/cost.py": ["tests/experiment/test_cost.py", RECOUNT, HAND_MADE],
    "experiment/budget.py": ["tests/experiment/test_budget.py", RECOUNT],
    "experiment/plan.py": [PLAN, "tests/experiment/test_rules.py", TRAIN, SETTINGS],
    "experiment/experiment.py": [HAND_MADE, TRAIN, STAGES, "tests/models/test_language.py"],
    "experiment/result.py": [
        RESULT, HAND_MADE, "tests/measure/report/test_tables.py", "tests/experiment/test_check.py",
    ],
    "experiment/reference.py": ["tests/experiment/test_check.py", HAND_MADE],
    "experiment/check.py": ["tests/experiment/test_check.py"],
    "experiment/checkpoints.py": [CHECKPOINTS, TRAIN, "tests/experiment/test_run.py"],
    "experiment/training_state.py": [TRAIN, CHECKPOINTS, RESUME],
    "train.py": [TRAIN, "tests/experiment/test_processes.py", SETTINGS, RECOUNT],
    "eval.py": [
        HAND_MADE, "tests/test_eval.py", "tests/experiment/test_check.py",
        "tests/experiment/test_reading.py",
    ],
}  # fmt: skip
BINARY = ("Add_Sub", "Sub_Add", "Mul_Div", "Div_Mul", "FloorDiv_Mul", "Mod_Add", "Pow_Mul")
COMPARISONS = ("Eq_NotEq", "NotEq_Eq", "Lt_GtE", "Lt_LtE", "LtE_Lt", "LtE_Gt", "Gt_GtE", "Gt_LtE",
    "GtE_Gt", "GtE_Lt", "Is_IsNot", "IsNot_Is")  # fmt: skip
OPERATORS = (
    *(f"core/ReplaceBinaryOperator_{name}" for name in BINARY),
    *(f"core/ReplaceComparisonOperator_{name}" for name in COMPARISONS),
    "core/ReplaceUnaryOperator_Delete_USub", "core/ReplaceUnaryOperator_Delete_Not",
    "core/AddNot", "core/ReplaceTrueWithFalse", "core/ReplaceFalseWithTrue",
    "core/ReplaceAndWithOr", "core/ReplaceOrWithAnd", "core/NumberReplacer",
    "core/ZeroIterationForLoop",
)  # fmt: skip


@dataclass(frozen=True)
class Change:
    """A module with one change."""

    module: str
    what: str
    code: str

    @property
    def place(self) -> str:
        """The first line that differs."""
        before = (ROOT / self.module).read_text("utf-8").splitlines()
        pairs = zip(before, self.code.splitlines(), strict=False)
        number, new = next((i, b) for i, (a, b) in enumerate(pairs, start=1) if a != b)
        return f"{self.module}:{number}: {self.what}: {new.strip()}"


def changes_of(module: str) -> Iterator[tuple[str, Callable[[], str]]]:
    """Every change of a module, outside docstrings and imports: what it is, and the new code."""
    code = (ROOT / module).read_text("utf-8")
    nodes = list(ast_nodes(get_ast(code)))
    for name in OPERATORS:
        short = name.removeprefix("core/").removeprefix("Replace").removesuffix("Replacer")
        operator = get_operator(name)()
        count = sum(len(list(operator.mutation_positions(node))) for node in nodes)
        for occurrence in range(count):
            yield short, partial(mutate_code, code, operator, occurrence)
    lines = code.splitlines(keepends=True)
    offsets = [0]
    for line in lines:
        offsets.append(offsets[-1] + len(line.encode()))
    source = code.encode()

    def span(node: ast.expr | ast.stmt | ast.keyword) -> tuple[int, int]:
        start = offsets[node.lineno - 1] + node.col_offset
        return start, offsets[node.end_lineno - 1] + node.end_col_offset

    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Call):
            for keyword in node.keywords:
                start, stop = span(keyword)
                rest = source[stop:].lstrip()
                stop = len(source) - len(rest[1:]) if rest.startswith(b",") else stop
                yield f"without {keyword.arg}=", (source[:start] + source[stop:]).decode
        is_statement = isinstance(node, ast.AugAssign | ast.Expr)
        if is_statement and not isinstance(getattr(node, "value", None), ast.Constant):
            start, stop = span(node)
            yield "without a statement", (source[:start] + b"pass" + source[stop:]).decode


def chosen(count: int, only: str) -> list[Change]:
    """A sample of all changes, the same every time; as many of each module as it has."""
    found = {name: list(changes_of(name)) for name in MODULES if name.startswith(only)}
    total = sum(map(len, found.values()))
    picked = []
    for module, changes in found.items():
        draw, distinct = random.Random(module), {}
        for what, code in draw.sample(changes, len(changes)):
            if len(distinct) == max(2, round(count * len(changes) / total)):
                break
            if (new := code()) and parses(new):
                distinct[new] = Change(module, what, new)
        picked += distinct.values()
    return random.Random(0).sample(picked, len(picked))


def parses(code: str) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(code)
    except SyntaxError:
        return False
    return True


def copy_of_project(place: Path) -> Path:
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout
    for name in names.splitlines():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, place / name)
    return place


def run_tests(folder: Path, tests: list[str]) -> None:
    """In a forked process: exit code 0 if all pass."""
    os.chdir(folder)
    sys.dont_write_bytecode = True
    sys.path[:] = [str(folder), *(p for p in sys.path if Path(p or ".").resolve() != ROOT)]
    for name in [n for n in sys.modules if n.split(".")[0] == "tests"]:
        del sys.modules[name]
    torch.set_num_threads(1)
    # The parent has imported plugins, which the rewriting of assertions warns about.
    imported = ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
    options = ["-x", "-q", "-p", "no:cacheprovider", *imported, "-m", "not slow"]
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        code = pytest.main([*options, *tests])
    os._exit(int(code))


def exit_code(folder: Path, tests: list[str], limit: float | None) -> tuple[int, float]:
    """Of the tests in a process of their own, and the seconds; -SIGKILL past the limit."""
    started = time.perf_counter()
    child = os.fork()
    if child == 0:
        try:
            run_tests(folder, tests)
        finally:
            os._exit(3)
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        seconds = time.perf_counter() - started
        if done:
            return os.waitstatus_to_exitcode(status), seconds
        if limit and seconds > limit:
            os.kill(child, signal.SIGKILL)
            limit = None
        time.sleep(0.1)


def noticed(change: Change, folder: Path, limit: float) -> tuple[bool | None, float]:
    """Whether a test fails or does not end in time, None if the tests cannot be collected; and
    after how many seconds."""
    file = folder / change.module
    before = file.read_text("utf-8")
    file.write_text(change.code, "utf-8")
    code, seconds = exit_code(folder, MODULES[change.module], limit)
    file.write_text(before, "utf-8")
    if code in (2, 4):  # an error in collecting the tests, or in importing their conftest
        return None, seconds
    if code not in (0, 1, -signal.SIGKILL):  # 1: a test failed; SIGKILL: no end
        raise SystemExit(f"{change.place}: the tests could not run (exit code {code})")
    return code != 0, seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--only", default="", help="modules whose path begins with this")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    changes = chosen(options.count, options.only)
    folders: Queue[Path] = Queue()
    results: dict[Change, bool | None] = {}
    unchanged: dict[str, float] = {}  # seconds of each selection's tests

    def measure(tests: str) -> None:
        folder = folders.get()
        code, unchanged[tests] = exit_code(folder, [tests], None)
        folders.put(folder)
        print(f"unchanged, exit code {code}, {unchanged[tests]:4.0f} s  {tests}", flush=True)
        if code:
            raise SystemExit(f"{tests} must pass before a change can be noticed.")

    def judge(change: Change) -> None:
        folder = folders.get()
        limit = 60 + 3 * sum(unchanged[tests] for tests in MODULES[change.module])
        results[change], seconds = noticed(change, folder, limit)
        folders.put(folder)
        mark = {True: "noticed ", False: "SURVIVED", None: "left out"}[results[change]]
        count = f"{len(results):>4}/{len(changes)}"
        print(f"{count} {mark} {seconds:4.0f} s  {change.place}", flush=True)

    selections = sorted({tests for change in changes for tests in MODULES[change.module]})
    with TemporaryDirectory() as scratch, ThreadPoolExecutor(options.workers) as pool:
        for number in range(options.workers):
            folders.put(copy_of_project(Path(scratch) / str(number)))
        try:
            list(pool.map(measure, selections))
            list(pool.map(judge, changes))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    judged = {change: seen for change, seen in results.items() if seen is not None}
    print()
    for module in MODULES:
        found = [seen for change, seen in judged.items() if change.module == module]
        if found:
            print(f"{module:<28} {sum(found):>3} of {len(found):>3}")
    print(f"{'all':<28} {sum(judged.values()):>3} of {len(judged):>3} changes noticed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
