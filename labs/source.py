"""A lab is one py-percent file with its solutions, between `# solution` and `# end`. In their place
the exercise edition has what follows `# stub`, or else a line that fails."""

import re
from pathlib import Path

from configs.schema import LabError

FOLDER = Path(__file__).parent
MINE = Path("mine")  # where a learner's editions are
SOLUTION = re.compile(
    r"^(?P<indent> *)# solution\n(?P<body>.*?)^(?P=indent)# end\n", re.MULTILINE | re.DOTALL
)
STUB = re.compile(r"^ *# stub (.*)$", re.MULTILINE)
STUB_LINE = re.compile(r"^ *# stub .*\n", re.MULTILINE)
EXERCISE = re.compile(r"^# %% exercise (?P<number>[\d.]+)$", re.MULTILINE)


def lab_file(number: int) -> Path:
    """LabError if there is no such lab."""
    found = sorted(FOLDER.glob(f"lab{number}_*.py"))
    if not found:
        known = ", ".join(str(n) for n in labs())
        raise LabError(f"no lab {number}; there are {known}")
    return found[0]


def labs() -> list[int]:
    return sorted(int(re.match(r"lab(\d+)", file.name)[1]) for file in FOLDER.glob("lab[0-9]*.py"))


def title_of(text: str) -> str:
    """The first heading."""
    return re.search(r"^# # (.*)$", text, re.MULTILINE)[1]


def exercise_edition(text: str) -> str:
    """The text of a lab without its solutions."""

    def stub(match: re.Match) -> str:
        given = STUB.findall(match["body"])
        if given:
            return "".join(f"{match['indent']}{line}\n" for line in given)
        number = EXERCISE.findall(text[: match.start()])[-1]
        return f'{match["indent"]}raise NotImplementedError("exercise {number}")\n'

    return SOLUTION.sub(stub, text)


def solution_edition(text: str) -> str:
    """The text of a lab without the marks around its solutions."""
    return SOLUTION.sub(lambda match: STUB_LINE.sub("", match["body"]), text)
