"""What another busy program costs a training with two threads, in ratios. About 4 minutes on an
idle machine. Exit code 1 if a ratio is above its limit.

    python -m tests.benchmarks.busy

`train.py` is run as a user runs it, as a process of its own: alone, with threads that soon sleep
while they wait (its default) and with threads that spin (torch's default), and beside two processes
that never rest. The teacher's seconds in the ledger are compared, medians of `ROUNDS`.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
ROUNDS = 3
CHANGES = ("task.limit=20000", "threads=2", "workers=1", "controls=[]", "verdicts=[]",
    "students.budget=0.05", "recipes={text: {access: text, sequences: teacher, outputs: "
    "{transfer_rows: 100}, objective: cross_entropy}}", "tune=null", "tuned=null")  # fmt: skip
MOST = {"soon sleeping / spinning": 1.05, "beside two busy processes / alone": 3.0}


def main() -> int:
    seconds: dict[str, list[float]] = {"spinning": [], "sleeping": [], "busy": []}
    for _ in range(ROUNDS):
        seconds["spinning"].append(teacher_seconds({"OMP_WAIT_POLICY": "ACTIVE"}))
        seconds["sleeping"].append(teacher_seconds({}))
        others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
        try:
            seconds["busy"].append(teacher_seconds({}))
        finally:
            for other in others:
                other.kill()
                other.wait()
    median = {name: statistics.median(times) for name, times in seconds.items()}
    found = {
        "soon sleeping / spinning": median["sleeping"] / median["spinning"],
        "beside two busy processes / alone": median["busy"] / median["sleeping"],
    }
    for name, times in seconds.items():
        print(f"{name:10} {' '.join(f'{time:.1f}' for time in times)} s")
    for name, ratio in found.items():
        print(f"{name}: {ratio:.2f} (at most {MOST[name]:g})")
    return int(any(ratio > MOST[name] for name, ratio in found.items()))


def teacher_seconds(environment: dict[str, str]) -> float:
    """The seconds of training the teacher, by the ledger of a run of `train.py`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    with tempfile.TemporaryDirectory() as runs:
        subprocess.run(
            [sys.executable, "train.py", "configs/quickstart.yaml", *CHANGES, "--runs", runs],
            cwd=ROOT, env=kept | environment, check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        ledger = json.loads((Path(runs) / "quickstart" / "ledger.json").read_text(encoding="utf-8"))
    return next(row["seconds"] for row in ledger if row["stage"] == "teacher")


if __name__ == "__main__":
    sys.exit(main())
