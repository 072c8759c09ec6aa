"""Who is extracting: alarms over a usage log, from what customers of before have asked.

    python -m measure.extraction runs/traffic.sqlite            # and runs/traffic.before.sqlite
    python -m measure.extraction runs/traffic.sqlite --score    # who was what?
    python -m measure.extraction runs/api.sqlite --before runs/before.sqlite --watch 10

An alarm suspends nobody.
"""

import argparse
import sys
import time
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

from configs.files import say
from configs.schema import LabError
from measure.alarms import DEFAULT, Alarm, Watch
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
        "--before", type=Path, metavar="LOG", help="of trusted customers; default: beside the log"
    )
    found.add_argument("--detector", choices=DETECTORS, default=DEFAULT)
    found.add_argument("--false-alarms", type=float, default=0.01, metavar="RATE")
    found.add_argument("--seed", type=int, default=0)
    found.add_argument(
        "--score", action="store_true", help="how many of each kind were found: of made-up traffic"
    )
    found.add_argument(
        "--watch", type=float, metavar="SECONDS", help="look again so often, until Ctrl-C"
    )
    return found


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        run(options)
    except LabError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def run(options: argparse.Namespace) -> None:
    before = read_log(options.before or before_of(options.log))
    watch = Watch(before, options.detector, options.false_alarms, options.seed)
    told: set[tuple[str, str]] = set()
    while True:
        log = read_log(options.log)
        alarms = [*watch.alarms(log)]
        for one in sorted(alarms, key=lambda one: one.at):
            if (one.rule, one.account) not in told:
                told.add((one.rule, one.account))
                say(line_of(one))
        if not options.watch:
            break
        record(options.log, alarms)
        time.sleep(options.watch)
    say(f"{len(told)} alarms; nobody was suspended")
    if options.score:
        say(table_of([scored(watch, log, alarms, kinds_of(options.log))]))


def record(log: Path, alarms: list[Alarm]) -> None:
    """For the page of the owner."""
    with closing(Store(log)) as store:
        for one in alarms:
            for account in one.members or (one.account,):
                store.record_alarm(account, one.rule, one.at, one.p)


def line_of(one: Alarm) -> str:
    at = datetime.fromtimestamp(one.at, UTC).isoformat(timespec="seconds")
    who = f"{len(one.members)} accounts of one program" if one.members else one.account
    return (
        f"{at}  {who:<26}  {one.rule:<10}  {one.requests:>6,} requests {one.tokens:>8,} tokens  "
        f"p = {one.p:.2g}"
    )


if __name__ == "__main__":
    sys.exit(main())
