"""The course.

python -m labs list                                      # the labs
python -m labs start 1                                   # writes mine/lab1.py
python -m labs solution 1                                # prints the solution edition
python -m labs build --out notebooks                     # of all labs
python -m labs grade mine/lab1.py --lab 1 --out result.json
python -m labs grade submissions/ --lab 1 --out results/ # every file of a folder
python -m labs play runs/quickstart                      # its models side by side, in a browser
"""

import argparse
import sys
from pathlib import Path

from configs.command import run_command
from configs.files import say, write_atomically, write_json
from configs.schema import LabError
from labs.grade import FORMATS, grade, grade_all
from labs.source import MINE, exercise_edition, lab_file, labs, solution_edition, title_of


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser("python -m labs", description=__doc__.splitlines()[0])
    commands = found.add_subparsers(required=True)
    commands.add_parser("list", help="the labs").set_defaults(do=list_labs)
    one = commands.add_parser("start", help="write the exercise edition of a lab")
    one.add_argument("lab", type=int)
    one.set_defaults(do=start)
    one = commands.add_parser("solution", help="print the solution edition of a lab")
    one.add_argument("lab", type=int)
    one.set_defaults(do=solution)
    one = commands.add_parser("build", help="notebooks: to read, to work in, with solutions")
    one.add_argument("labs", type=int, nargs="*", help="default: all")
    one.add_argument("--out", type=Path, default=Path("notebooks"))
    one.set_defaults(do=build_notebooks)
    one = commands.add_parser("grade", help="check a file, or every file of a folder")
    one.add_argument("path", type=Path)
    one.add_argument("--lab", type=int, required=True)
    one.add_argument("--out", type=Path, required=True)
    one.add_argument("--format", choices=FORMATS, default="lab")
    one.add_argument("--at-once", type=int, default=2, help="submissions graded side by side")
    one.set_defaults(do=grade_path)
    one = commands.add_parser("play", help="ask the models of a run, in a browser")
    one.add_argument("run", type=Path, help="a finished run, e.g. runs/quickstart")
    one.add_argument("--port", type=int, default=8100)
    one.set_defaults(do=play)
    return found


def list_labs(options: argparse.Namespace) -> None:
    for number in labs():
        say(title_of(lab_file(number).read_text(encoding="utf-8")))


def start(options: argparse.Namespace) -> None:
    file = MINE / f"lab{options.lab}.py"
    if file.exists():
        raise LabError(f"{file} exists; move it elsewhere to start again")
    text = lab_file(options.lab).read_text(encoding="utf-8")
    write_atomically(file, exercise_edition(text))
    say(f"{file} is yours\nnext: python -m pytest labs/checks/lab{options.lab} --mine")


def solution(options: argparse.Namespace) -> None:
    print(solution_edition(lab_file(options.lab).read_text(encoding="utf-8")), end="")


def build_notebooks(options: argparse.Namespace) -> None:
    try:
        from labs.notebooks import build
    except ImportError:
        raise LabError(
            'notebooks need more packages: pip install -c constraints.txt -e ".[course]"'
        ) from None
    build(options.labs or labs(), options.out)


def play(options: argparse.Namespace) -> None:
    try:
        from labs.play import serve
    except ImportError:
        raise LabError(
            'the page needs more packages: pip install -c constraints.txt -e ".[play]"'
        ) from None
    serve(options.run, options.port)


def grade_path(options: argparse.Namespace) -> None:
    if options.path.is_dir():
        files = sorted(options.path.glob("*.py"))
        if not files:
            raise LabError(f"{options.path} holds no .py files")
        grade_all(files, options.lab, options.out, options.at_once)
        return
    checks = grade(options.path, options.lab)
    write_json(options.out, FORMATS[options.format](checks))
    for one in checks:
        said = f": {one.message}" if one.message else ""
        say(f"{one.points:g} of {one.worth:g}  {one.check}{said}")


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    return run_command(lambda: options.do(options) or 0, "what was written stays")


if __name__ == "__main__":
    sys.exit(main())
