"""Plant a few hundred generated single-point changes and print the share that the tests notice.

    make mutants-wide                       # 200 changes, others every time
    python -m tests.mutants_wide --count 40 --only measure --seed 7

The changes are those of cosmic-ray, and two more: a keyword argument or a statement removed. The
wording of messages is left alone. First the fast tests run unchanged, under coverage: which tests
execute which lines, directly or through their fixtures. Then each change is planted in a copy of
the project, in which the tests that execute its line run, the quickest first, until one fails or
`--seconds` are used up. A change with which nothing can be imported says nothing about the tests
and is left out of the share.
"""

import argparse
import ast
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from functools import cached_property, partial
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
from coverage import Coverage

ROOT = Path(__file__).parent.parent
# The modules that decide results.
MODULES = (
    "models/rows.py", "models/generate.py", "models/language.py",
    "tasks/pronounce.py", "tasks/reason.py", "tasks/gsm8k.py", "tasks/digits.py", "tasks/text.py",
    "teacher/signal.py", "teacher/access.py", "teacher/source.py", "teacher/outputs.py",
    "teacher/shards.py",
    "measure/metrics.py", "measure/fidelity.py", "measure/statistics.py", "measure/verdicts.py",
    "measure/evaluate.py", "measure/reasoning.py", "measure/laws.py", "measure/savings.py",
    "measure/report/tables.py", "measure/report/sentences.py", "measure/report/story.py",
    "student/objectives.py", "student/hidden.py", "student/loss.py", "student/chunked.py",
    "student/training_set.py", "student/on_policy.py", "student/recipe.py",
    "experiment/tuning.py", "experiment/tries.py", "experiment/cost.py", "experiment/budget.py",
    "experiment/plan.py", "experiment/experiment.py", "experiment/result.py",
    "experiment/reference.py", "experiment/check.py", "experiment/checkpoints.py",
    "experiment/training_state.py",
    "train.py", "eval.py",
)  # fmt: skip
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

    @cached_property
    def line(self) -> int:
        """The first line that differs."""
        before = (ROOT / self.module).read_text("utf-8").splitlines()
        pairs = zip(before, self.code.splitlines(), strict=False)
        return next(number for number, (a, b) in enumerate(pairs, start=1) if a != b)

    @property
    def place(self) -> str:
        new = self.code.splitlines()[self.line - 1].strip()
        return f"{self.module}:{self.line}: {self.what}: {new}"


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


class WithoutWording(ast.NodeTransformer):
    """Code without the words that its messages are made of."""

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        return ast.Raise()

    def visit_keyword(self, node: ast.keyword) -> ast.AST | None:
        return None if node.arg in ("help", "metavar") else self.generic_visit(node)


def meaning(code: str) -> str | None:
    """The code without its wording; None if it does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.dump(WithoutWording().visit(ast.parse(code)))
    except SyntaxError:
        return None


def chosen(count: int, only: str, seed: int) -> list[Change]:
    """A sample of all changes; as many of each module as it has, but at least two."""
    found = {name: list(changes_of(name)) for name in MODULES if name.startswith(only)}
    total = sum(map(len, found.values()))
    picked = []
    for module, changes in found.items():
        same = {None, "", meaning((ROOT / module).read_text("utf-8"))}
        distinct = {}
        for what, code in random.Random(f"{seed} {module}").sample(changes, len(changes)):
            if len(distinct) == max(2, round(count * len(changes) / total)):
                break
            if (new := code()) and (means := meaning(new)) not in same:
                distinct[means] = Change(module, what, new)
        picked += distinct.values()
    return random.Random(seed).sample(picked, len(picked))


def copy_of_project(place: Path) -> Path:
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout
    for name in names.splitlines():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, place / name)
    return place


@dataclass(eq=False)  # pytest keeps plugins in sets
class Recorder:
    """A plugin of pytest: what each test and each fixture executes, and how long it takes.

    A fixture that many tests share is a context of its own: its lines count for all of them.
    """

    folder: Path
    running: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    needs: dict[str, list[str]] = field(default_factory=dict)
    failed: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.coverage = Coverage(data_file=None, include=[f"{self.folder}/*"], config_file=False)
        self.coverage.start()

    def within(self, context: str) -> Iterator[None]:
        """The context of whatever runs until the generator goes on; its own seconds alone, of the
        processor: others may be using it, too."""
        started = sum(os.times()[:4])
        self.running.append(context)
        self.coverage.switch_context(context)
        try:
            return (yield)
        finally:
            seconds = sum(os.times()[:4]) - started
            self.running.pop()
            self.seconds[context] += seconds
            if self.running:
                self.seconds[self.running[-1]] -= seconds
            self.coverage.switch_context(self.running[-1] if self.running else "")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        return (yield from self.within(item.nodeid))

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: pytest.FixtureDef, request) -> Iterator[None]:
        if fixturedef.scope == "function":
            return (yield)
        context = f"fixture {fixturedef.baseid} {fixturedef.argname}"
        return (yield from self.within(context))

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        self.needs[item.nodeid] = []
        for name in item.fixturenames:
            for fixture in item._fixtureinfo.name2fixturedefs.get(name, ()):
                if fixture.scope != "function":
                    self.needs[item.nodeid].append(f"fixture {fixture.baseid} {name}")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not report.passed:  # skipped ones notice nothing, either
            self.failed.add(report.nodeid)

    def write(self, file: Path) -> None:
        self.coverage.stop()
        data = self.coverage.get_data()
        lines = {
            module: {
                number: [context for context in contexts if context]
                for number, contexts in data.contexts_by_lineno(str(self.folder / module)).items()
            }
            for module in MODULES
        }
        found = {"lines": lines, "seconds": self.seconds, "needs": self.needs}
        file.write_text(json.dumps(found | {"failed": sorted(self.failed)}), "utf-8")


def run_tests(folder: Path, tests: list[str], record: Path | None) -> None:
    """In a forked process: exit code 0 if all pass."""
    os.chdir(folder)
    sys.dont_write_bytecode = True
    sys.path[:] = [str(folder), *(p for p in sys.path if Path(p or ".").resolve() != ROOT)]
    for name in [n for n in sys.modules if n.split(".")[0] == "tests"]:
        del sys.modules[name]
    torch.set_num_threads(1)
    # The parent has imported plugins, which the rewriting of assertions warns about.
    options = ["-q", "-p", "no:cacheprovider", "-m", "not slow"]
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
    plugins = [Recorder(folder)] if record else []
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        code = pytest.main([*options, *([] if record else ["-x"]), *tests], plugins=plugins)
    if record:
        plugins[0].write(record)
    os._exit(int(code))


def exit_code(
    folder: Path, tests: list[str], limit: float | None = None, record: Path | None = None
) -> tuple[int, float]:
    """Of the tests in a process of their own, and the seconds; -SIGKILL past the limit."""
    started = time.perf_counter()
    child = os.fork()
    if child == 0:
        try:
            run_tests(folder, tests, record)
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
        time.sleep(0.05)


@dataclass
class Record:
    """What the unchanged tests execute: contexts (tests and shared fixtures) by line."""

    lines: dict[str, dict[int, set[str]]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    needs: dict[str, set[str]] = field(default_factory=dict)  # the shared fixtures of a test
    failed: set[str] = field(default_factory=set)

    def add(self, found: dict) -> None:
        for module, lines in found["lines"].items():
            here = self.lines.setdefault(module, {})
            for number, contexts in lines.items():
                here.setdefault(int(number), set()).update(contexts)
        self.needs |= {test: set(fixtures) for test, fixtures in found["needs"].items()}
        self.seconds |= found["seconds"]
        self.failed |= set(found["failed"])

    def tests_of(self, change: Change, seconds: float) -> list[str]:
        """The tests that execute its statement; if it is executed on import, those that execute
        anything in its module or whose file imports it. And the others of the module's own file of
        tests: what one test makes and keeps, the next one reads. Those of the own file first, then
        of its folder, the quickest first: as many as take these seconds, at least one."""
        lines, importers = self.lines[change.module], set()
        statement = statement_at((ROOT / change.module).read_text("utf-8"), change.line)
        contexts = set().union(*(lines.get(number, ()) for number in statement))
        if not contexts:
            contexts = set().union(*lines.values())
            importers = {file for file in self.files() if imports(file, change.module)}
        folder, _, name = change.module.rpartition("/")
        near = (f"tests/{folder}/test_{name}::", f"tests/{folder}/") if folder else ("tests/test_",)
        executing = {
            test
            for test, fixtures in self.needs.items()
            if test.split("::")[0] in importers or not contexts.isdisjoint({test} | fixtures)
        }
        own = {test for test in self.needs if folder and test.startswith(near[0])}
        tests = sorted(
            (executing | own if executing else set()) - self.failed,
            key=lambda test: (
                next((i for i, start in enumerate(near) if test.startswith(start)), len(near)),
                test not in executing,
                self.cost([test]),
                test,
            ),
        )
        planned = {}
        for test in tests:
            planned |= dict.fromkeys([test, *self.needs[test]])
            if sum(self.seconds[name] for name in planned) > seconds:
                return tests[: max(1, tests.index(test))]
        return tests

    def never_executed(self) -> str:
        """The lines that no test executes, of all modules."""
        found = []
        for module in MODULES:
            seen, code = self.lines[module], (ROOT / module).read_text("utf-8")
            for node in ast.walk(ast.parse(code)):
                counts = isinstance(node, ast.stmt) and not isinstance(node, ast.FunctionDef)
                counts &= not isinstance(getattr(node, "value", None), ast.Constant)  # a docstring
                if counts and seen.keys().isdisjoint(statement_at(code, node.lineno)):
                    found.append(f"{module}:{node.lineno}")
        return ", ".join(found)

    def files(self) -> set[str]:
        return {test.split("::")[0] for test in self.needs}

    def cost(self, tests: list[str]) -> float:
        """Seconds of these tests and of the fixtures that they share."""
        fixtures = set().union(*(self.needs[test] for test in tests))
        return sum(self.seconds[name] for name in {*tests, *fixtures})


def imports(file: str, module: str) -> bool:
    """Whether a file of tests imports a module of the project, or the package that collects it."""
    wanted = module.removesuffix(".py").replace("/", ".")
    names = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return bool(names & {wanted, wanted.rpartition(".")[0]})


def statement_at(code: str, line: int) -> range:
    """The lines of the innermost statement there, without the body of an if, for or with; of a
    function whose head it is, with its body."""
    found = range(line, line + 1)
    for node in ast.walk(ast.parse(code)):  # outer ones first
        if isinstance(node, ast.stmt) and node.lineno <= line <= node.end_lineno:
            found = range(node.lineno, node.end_lineno + 1)
            if isinstance(node, ast.If | ast.For | ast.While | ast.With):
                found = range(node.lineno, node.body[0].lineno)
    return found


def noticed(
    change: Change, folder: Path, record: Record, seconds: float
) -> tuple[bool | None, float]:
    """Whether a test fails or does not end in time, None if the tests cannot be collected; and
    after how many seconds."""
    tests = record.tests_of(change, seconds)
    if not tests:
        return False, 0.0
    file = folder / change.module
    before = file.read_text("utf-8")
    file.write_text(change.code, "utf-8")
    code, taken = exit_code(folder, tests, 60 + 3 * record.cost(tests))
    file.write_text(before, "utf-8")
    if code in (2, 4):  # an error in collecting the tests, or in importing their conftest
        return None, taken
    if code not in (0, 1, -signal.SIGKILL):  # 1: a test failed; SIGKILL: no end
        raise SystemExit(f"{change.place}: the tests could not run (exit code {code})")
    return code != 0, taken


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--only", default="", help="modules whose path begins with this")
    parser.add_argument("--seconds", type=float, default=150, help="of tests per change, at most")
    parser.add_argument("--seed", type=int, help="of the sample; default: another every time")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    seed = random.randrange(10**6) if options.seed is None else options.seed
    changes = chosen(options.count, options.only, seed)
    print(f"{len(changes)} changes, --seed {seed}", flush=True)
    folders: Queue[Path] = Queue()
    record = Record()
    results: dict[Change, bool | None] = {}
    started = time.perf_counter()

    def measure(file: Path) -> None:
        folder = folders.get()
        found = folder / "record.json"
        code, seconds = exit_code(folder, [str(file.relative_to(ROOT))], None, found)
        if code not in (0, 1, 5):  # 5: all tests of the file are slow
            raise SystemExit(f"{file.name}: the unchanged tests could not run (exit code {code})")
        record.add(json.loads(found.read_text("utf-8")))
        folders.put(folder)
        print(f"unchanged, {seconds:4.0f} s  {file.relative_to(ROOT)}", flush=True)

    def judge(change: Change) -> None:
        folder = folders.get()
        results[change], seconds = noticed(change, folder, record, options.seconds)
        folders.put(folder)
        mark = {True: "noticed ", False: "SURVIVED", None: "left out"}[results[change]]
        count = f"{len(results):>4}/{len(changes)}"
        print(f"{count} {mark} {seconds:4.0f} s  {change.place}", flush=True)

    files = sorted(set(ROOT.glob("tests/**/test_*.py")) - {ROOT / "tests/test_mutants.py"})
    with TemporaryDirectory() as scratch, ThreadPoolExecutor(options.workers) as pool:
        for number in range(options.workers):
            folders.put(copy_of_project(Path(scratch) / str(number)))
        try:
            list(pool.map(measure, files))
            print(f"not used, as they fail or are skipped here: {sorted(record.failed)}")
            print(f"executed by no test: {record.never_executed()}", flush=True)
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
    minutes = (time.perf_counter() - started) / 60
    print(
        f"{'all':<28} {sum(judged.values()):>3} of {len(judged):>3} changes noticed, "
        f"in {minutes:.0f} minutes (--seed {seed})"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
