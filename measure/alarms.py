"""Alarms over a usage log: who asks as no customer before has asked.

A threshold is one that customers exceed with a known probability (split conformal prediction,
Vovk et al. 2005): nothing is learned from attacks.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy.stats import t

from configs.schema import LabError
from measure.detectors import DETECTORS, Score, Trusted
from measure.usage import FEWEST, Account, Log, Map, checkpoints

LINKED = 3  # accounts of one program, from which on they are judged together
AS_IT_GOES, AT_THE_END, TOGETHER = "as it goes", "at the end", "together"
RULES = (AS_IT_GOES, AT_THE_END, TOGETHER)
DEFAULT = "counterparts"


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
        self, before: Log, detector: str = DEFAULT, false_alarms: float = 0.01, seed: int = 0
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

    def final_scores(self, log: Log) -> dict[str, float]:
        """{account: its score at the end}."""
        judged = [account for account in log.accounts if len(account) >= FEWEST]
        if not judged:
            return {}
        scores = self.score(judged, self.map.of(log.prompts))
        return {one.name: float(score) for one, score in zip(judged, scores, strict=True)}

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
