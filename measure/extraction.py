"""Detect extraction: alarms over a usage log, calibrated on trusted accounts.

    python -m measure.extraction runs/traffic.sqlite            # with runs/traffic.before.sqlite
    python -m measure.extraction runs/traffic.sqlite --score    # and the kinds of made-up traffic
    python -m measure.extraction runs/api.sqlite --before runs/before.sqlite --watch 10

No alarm suspends an account.
"""

import argparse
import sys
import time
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

from configs.command import run_command
from configs.files import say
from configs.schema import LabError
from measure.alarms import DEFAULT, RULES, SEQUENTIAL, Alarm, Monitor
from measure.detection import before_of, kinds_of, scored, table_of
from measure.detectors import DETECTORS
from measure.usage import read_log
from teacher.api.store import Store


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        "python -m measure.extraction", description=__doc__.splitlines()[0]
    )
    found.add_argument("log", type=Path, help="a usage log, e.g. runs/api.sqlite")
    found.add_argument(
        "--before", type=Path, metavar="LOG", help="of trusted accounts; default: beside the log"
    )
    found.add_argument("--detector", choices=DETECTORS, default=DEFAULT)
    found.add_argument(
        "--false-alarms", type=float, default=0.01, metavar="RATE", help="of each rule"
    )
    found.add_argument("--seed", type=int, default=0)
    found.add_argument(
        "--score", action="store_true", help="how many of each kind were found, in made-up traffic"
    )
    found.add_argument(
        "--watch", type=float, metavar="SECONDS", help="read the log so often, until Ctrl-C, with "
        "sequential alarms only",
    )  # fmt: skip
    return found


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    return run_command(lambda: run(options), "the alarms above stay as they are")


def run(options: argparse.Namespace) -> int:
    if options.watch and options.score:
        raise LabError("--score is for a finished log; remove --watch")
    trusted = read_log(options.before or before_of(options.log))
    monitor = Monitor(trusted, options.detector, options.false_alarms, options.seed)
    if not monitor.judges_linked:
        say("no linked accounts are judged: trusted accounts share too few programs")
    rules = (SEQUENTIAL,) if options.watch else RULES
    printed: set[tuple[str, str]] = set()
    while True:
        log = read_log(options.log, trusted.seconds)  # as long as the trusted one
        alarms = [*monitor.alarms(log, rules)]
        for one in sorted(alarms, key=lambda one: one.at):
            if (one.rule, one.account) not in printed:
                printed.add((one.rule, one.account))
                say(line_of(one))
        if not options.watch:
            break
        record(options.log, alarms)
        time.sleep(options.watch)
    say(f"{len(printed)} alarms; no account was suspended")
    if options.score:
        say(table_of([scored(monitor, log, alarms, kinds_of(options.log))]))
    return 0


def record(log: Path, alarms: list[Alarm]) -> None:
    """Write alarms into the server's database, for its admin page."""
    with closing(Store(log)) as store:
        for one in alarms:
            store.record_alarm(one.account, one.rule, one.at, one.p)


def line_of(one: Alarm) -> str:
    at = datetime.fromtimestamp(one.at, UTC).isoformat(timespec="seconds")
    who = f"{len(one.members)} linked accounts" if one.members else one.account
    return (
        f"{at}  {who:<20}  {one.rule:<10}  {one.requests:>6,} requests {one.tokens:>8,} tokens  "
        f"p = {one.p:.2g}"
    )


if __name__ == "__main__":
    sys.exit(main())
