"""Who is extracting: alarms over a usage log, from what customers of before have asked.

    python -m measure.extraction runs/traffic.sqlite --before runs/before.sqlite
    python -m measure.extraction runs/api.sqlite --before runs/before.sqlite --watch 10

A threshold is one that customers exceed with a known probability (split conformal prediction,
Vovk et al. 2005): nothing is learned from attacks. An alarm suspends nobody.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from scipy.stats import beta, t

from configs.files import read_json, say
from configs.schema import LabError
from measure.detectors import DETECTORS, Score, Trusted
from measure.usage import FEWEST, Account, Log, Map, checkpoints, read_log
from teacher.api.store import Store

LINKED = 3  # accounts of one program, from which on they are judged together
AS_IT_GOES, AT_THE_END, TOGETHER = "as it goes", "at the end", "together"
RULES = (AS_IT_GOES, AT_THE_END, TOGETHER)


@dataclass(frozen=True)
class Alarm:
    """account: or the program whose accounts are linked. at: when, in seconds; requests and tokens:
    of the account until then. p: the share of customers that would have exceeded this score."""

    rule: str
    account: str
    at: float
    requests: int
    tokens: int
    p: float
    members: tuple[str, ...] = ()


class Watch:
    """A detector and its thresholds, from a log of customers that are trusted. LabError if they are
    too few for this rate of false alarms."""

    def __init__(
        self, before: Log, detector: str = "counterparts", false_alarms: float = 0.01, seed: int = 0
    ) -> None:
        self.false_alarms = false_alarms
        known = [account for account in before.accounts if len(account) >= FEWEST]
        if (len(known) + 1) * false_alarms < 1:
            raise LabError(
                f"{len(known)} trusted accounts with {FEWEST} requests or more; a rate of "
                f"{false_alarms:g} false alarms needs {int(np.ceil(1 / false_alarms)) - 1}"
            )
        self.map = Map(before.prompts, seed)
        order = np.random.Generator(np.random.PCG64(seed)).permutation(len(known))
        halves = [[known[i] for i in order[part::2]] for part in (0, 1)]
        fits = [DETECTORS[detector](Trusted(half, self.map, seed)) for half in halves]
        self.score = DETECTORS[detector](Trusted(known, self.map, seed))
        # Every customer is judged by a fit without it.
        courses: dict[str, np.ndarray] = {}
        for half, fit in zip(halves, reversed(fits), strict=True):
            courses |= courses_of(half, fit, self.map.vectors)
        self.known = {
            AS_IT_GOES: np.sort([max(scores) for scores in courses.values()]),
            AT_THE_END: np.sort([scores[-1] for scores in courses.values()]),
        }
        self.groups = np.array([
            self.surprise([courses[one.name][-1] for one in members])
            for members in linked(known).values()
        ])  # fmt: skip

    def p(self, rule: str, score: float) -> float:
        """The share of customers with at least this score, itself counted among them."""
        known = self.known[rule]
        exceeding = len(known) - np.searchsorted(known, score, side="left")
        return (1 + int(exceeding)) / (1 + len(known))

    def surprise(self, scores: list[float]) -> float:
        """How small the p-values of linked accounts are together (Fisher 1925), standardised: about
        the same for few and many that are ordinary."""
        logs = -2 * np.log([self.p(AT_THE_END, score) for score in scores])
        return float(logs.sum() - 2 * len(logs)) / (4 * len(logs)) ** 0.5

    def p_together(self, surprise: float) -> float:
        """By the spread of the programs that customers use: prediction of one more (Student's t).
        1 where too few are known."""
        if len(self.groups) < LINKED:
            return 1.0
        spread = self.groups.std(ddof=1) * (1 + 1 / len(self.groups)) ** 0.5
        return float(t.sf((surprise - self.groups.mean()) / spread, len(self.groups) - 1))

    def alarms(self, log: Log) -> Iterator[Alarm]:
        """All alarms of a log; an account can raise one of each rule."""
        vectors = self.map.of(log.prompts) if log.prompts else None
        judged = [account for account in log.accounts if len(account) >= FEWEST]
        courses = courses_of(judged, self.score, vectors)
        for account in judged:
            scores = courses[account.name]
            ps = [self.p(AS_IT_GOES, score) for score in scores]
            first = next((i for i, p in enumerate(ps) if p <= self.false_alarms), None)
            if first is not None:
                yield alarm(AS_IT_GOES, account, checkpoints(account)[first], ps[first])
            last = self.p(AT_THE_END, scores[-1])
            if last <= self.false_alarms:
                yield alarm(AT_THE_END, account, len(account), last)
        for program, members in linked(judged).items():
            p = self.p_together(self.surprise([courses[one.name][-1] for one in members]))
            if p <= self.false_alarms:
                yield Alarm(
                    TOGETHER,
                    program,
                    max(float(one.start[-1]) for one in members),
                    sum(map(len, members)),
                    sum(int(one.tokens.sum()) for one in members),
                    p,
                    tuple(one.name for one in members),
                )


def courses_of(accounts: list[Account], score: Score, vectors: np.ndarray) -> dict[str, np.ndarray]:
    """{account: its scores at its checkpoints}."""
    if not accounts:
        return {}
    parts = [[one.first(count) for count in checkpoints(one)] for one in accounts]
    scores = score([part for found in parts for part in found], vectors)
    ends = np.cumsum([len(found) for found in parts])[:-1]
    return {one.name: own for one, own in zip(accounts, np.split(scores, ends), strict=True)}


def alarm(rule: str, account: Account, count: int, p: float) -> Alarm:
    tokens = int(account.tokens[:count].sum())
    return Alarm(rule, account.name, float(account.start[count - 1]), count, tokens, p)


def linked(accounts: list[Account]) -> dict[str, list[Account]]:
    """Accounts of one program, which asks for the same in the same way."""
    found: dict[str, list[Account]] = {}
    for account in accounts:
        found.setdefault(account.signature, []).append(account)
    return {program: members for program, members in found.items() if len(members) >= LINKED}


# -- how good alarms are, for who knows who was what -----------------------------------------------


@dataclass(frozen=True)
class Rate:
    """found of total, with an interval (Clopper and Pearson 1934)."""

    found: int
    total: int

    @property
    def share(self) -> float:
        return self.found / self.total if self.total else 0.0

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        low, high = (1 - level) / 2, (1 + level) / 2
        k, n = self.found, self.total
        return (
            float(beta.ppf(low, k, n - k + 1)) if k else 0.0,
            float(beta.ppf(high, k + 1, n - k)) if k < n else 1.0,
        )


BENIGN = ("chat", "application", "batch", "evaluation")


def rates(alarms: list[Alarm], kinds: dict[str, str]) -> dict[str, dict[str, Rate]]:
    """{rule: {kind, or `customers`: how many of its accounts raised an alarm}}."""
    found = {}
    for rule in RULES:
        raised = {one.account for one in alarms if one.rule == rule}
        raised |= {name for one in alarms if one.rule == rule for name in one.members}
        groups = {kind: {kind} for kind in dict.fromkeys(kinds.values())}
        groups = {"customers": {*BENIGN}} | groups
        found[rule] = {
            group: Rate(
                sum(kind in members and name in raised for name, kind in kinds.items()),
                sum(kind in members for kind in kinds.values()),
            )
            for group, members in groups.items()
        }
    return found


def leaked(alarms: list[Alarm], kinds: dict[str, str]) -> dict[str, list[int]]:
    """{kind: the tokens that each of its accounts had when the first alarm came}."""
    first: dict[str, Alarm] = {}
    for one in alarms:
        if one.rule == AS_IT_GOES:
            first.setdefault(one.account, one)
    return {
        kind: sorted(first[name].tokens for name in first if kinds[name] == kind)
        for kind in dict.fromkeys(kinds.values())
    }


# -- the command -----------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        "python -m measure.extraction", description=__doc__.splitlines()[0]
    )
    found.add_argument("log", type=Path, help="a usage log, e.g. runs/api.sqlite")
    found.add_argument("--before", type=Path, required=True, help="the log of trusted customers")
    found.add_argument("--detector", choices=DETECTORS, default="counterparts")
    found.add_argument("--false-alarms", type=float, default=0.01, metavar="RATE")
    found.add_argument("--seed", type=int, default=0)
    found.add_argument("--labels", type=Path, help="who was what: for scoring made-up traffic")
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
    watch = Watch(read_log(options.before), options.detector, options.false_alarms, options.seed)
    told: set[tuple[str, str]] = set()
    while True:
        alarms = [*watch.alarms(read_log(options.log))]
        for one in sorted(alarms, key=lambda one: one.at):
            if (one.rule, one.account) not in told:
                told.add((one.rule, one.account))
                say(line_of(one))
        if not options.watch:
            break
        record(options.log, alarms)
        time.sleep(options.watch)
    say(f"{len(told)} alarms; nobody was suspended")
    if options.labels:
        labels = read_json(options.labels, dict)
        kinds = {name: label["kind"] for name, label in labels.items()}
        say(table_of(alarms, kinds))


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


def table_of(alarms: list[Alarm], kinds: dict[str, str]) -> str:
    lines = [f"{'alarms of':<14}" + "".join(f"{rule:>22}" for rule in RULES) + "   tokens by then"]
    found, tokens = rates(alarms, kinds), leaked(alarms, kinds)
    for kind in found[AS_IT_GOES]:
        cells = ""
        for rule in RULES:
            rate = found[rule][kind]
            low, high = rate.interval()
            cells += f"{f'{rate.share:.1%} ({low:.1%}-{high:.1%})':>22}"
        middle = f"{int(np.median(tokens[kind])):,}" if tokens.get(kind) else ""
        lines.append(f"{kind:<14}{cells}{middle:>17}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
