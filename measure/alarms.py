"""Alarms over a usage log: accounts that differ from trusted ones.

A threshold is one that trusted accounts exceed with a chosen probability (split conformal
prediction, Vovk et al. 2005): a detector is fitted on half of them, and its threshold is a quantile
of the scores of the other half. Each rule has this rate of false alarms.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy.stats import t

from configs.schema import LabError
from measure.detectors import DETECTORS, Score, Trusted
from measure.usage import FEWEST, Account, Log, PromptSpace, checkpoints

# sequential: the first checkpoint at which an account exceeds the threshold of running maxima.
# final: an account's score at the end of the log. linked: the final scores of accounts that share
# a program, together.
SEQUENTIAL, FINAL, LINKED = RULES = ("sequential", "final", "linked")
FEWEST_LINKED = 3  # accounts
FEWEST_GROUPS = 3  # of trusted accounts, to predict the spread of linked scores
DEFAULT = "simulated"


@dataclass(frozen=True)
class Alarm:
    """account: or the program of linked accounts. at: seconds; requests and tokens: until then. p:
    the share of trusted accounts that would exceed this score."""

    rule: str
    account: str
    at: float
    requests: int
    tokens: int
    p: float
    members: tuple[str, ...] = ()


class Monitor:
    """A fitted detector and its thresholds. LabError if the trusted accounts are too few for this
    rate of false alarms."""

    def __init__(
        self, trusted: Log, detector: str = DEFAULT, false_alarms: float = 0.01, seed: int = 0
    ) -> None:
        self.false_alarms, known = false_alarms, trusted.scored
        order = np.random.Generator(np.random.PCG64(seed)).permutation(len(known))
        fitted, calibration = ([known[i] for i in order[part::2]] for part in (0, 1))
        fewest = int(np.ceil(1 / false_alarms)) - 1
        if len(calibration) < fewest:
            raise LabError(
                f"{len(known)} trusted accounts with {FEWEST} requests or more; a rate of "
                f"{false_alarms:g} false alarms needs {2 * fewest}, half of them for the threshold"
            )
        used = np.unique(np.concatenate([account.prompts for account in fitted]))
        self.space = PromptSpace([trusted.prompts[i] for i in used], seed)
        vectors = self.space.vectors(trusted.prompts)
        self.score = DETECTORS[detector](Trusted(fitted, self.space, vectors, seed))
        histories = score_histories(calibration, self.score, vectors)
        self.calibration = {
            SEQUENTIAL: np.sort([max(scores) for scores in histories.values()]),
            FINAL: np.sort([scores[-1] for scores in histories.values()]),
        }
        self.groups = np.array([
            self.fisher_score([histories[one.name][-1] for one in members])
            for members in linked(calibration).values()
        ])  # fmt: skip

    def p(self, rule: str, score: float) -> float:
        """The share of the calibration scores that are at least this high, itself counted."""
        known = self.calibration[rule]
        exceeding = len(known) - np.searchsorted(known, score, side="left")
        return (1 + int(exceeding)) / (1 + len(known))

    def fisher_score(self, scores: list[float]) -> float:
        """Fisher's combination of the p-values of linked accounts (1925), standardised by its mean
        and standard deviation for independent accounts."""
        logs = -2 * np.log([self.p(FINAL, score) for score in scores])
        return float(logs.sum() - 2 * len(logs)) / (4 * len(logs)) ** 0.5

    @property
    def judges_linked(self) -> bool:
        return len(self.groups) >= FEWEST_GROUPS

    def p_linked(self, fisher_score: float) -> float:
        """By a prediction interval over the programs of trusted accounts (Student's t), which share
        more than independent accounts do."""
        if not self.judges_linked:
            return 1.0
        spread = self.groups.std(ddof=1) * (1 + 1 / len(self.groups)) ** 0.5
        return float(t.sf((fisher_score - self.groups.mean()) / spread, len(self.groups) - 1))

    def final_scores(self, log: Log) -> dict[str, float]:
        """{account: its score at the end}."""
        if not log.scored:
            return {}
        scores = self.score(log.scored, self.space.vectors(log.prompts))
        return {one.name: float(score) for one, score in zip(log.scored, scores, strict=True)}

    def alarms(self, log: Log, rules: tuple[str, ...] = RULES) -> Iterator[Alarm]:
        """All alarms of a log, at most one of each rule for an account. A log that is still being
        written has only sequential ones at the stated rate: the others judge an account once."""
        if not log.scored:
            return
        histories = score_histories(log.scored, self.score, self.space.vectors(log.prompts))
        for account in log.scored:
            scores = histories[account.name]
            ps = [self.p(SEQUENTIAL, score) for score in scores]
            first = next((i for i, p in enumerate(ps) if p <= self.false_alarms), None)
            if SEQUENTIAL in rules and first is not None:
                yield alarm(SEQUENTIAL, account, checkpoints(account)[first], ps[first])
            last = self.p(FINAL, scores[-1])
            if FINAL in rules and last <= self.false_alarms:
                yield alarm(FINAL, account, len(account), last)
        for program, members in linked(log.scored).items() if LINKED in rules else ():
            p = self.p_linked(self.fisher_score([histories[one.name][-1] for one in members]))
            if p <= self.false_alarms:
                yield Alarm(
                    LINKED,
                    program,
                    max(float(one.start[-1]) for one in members),
                    sum(map(len, members)),
                    sum(int(one.tokens.sum()) for one in members),
                    p,
                    tuple(one.name for one in members),
                )


def score_histories(
    accounts: list[Account], score: Score, vectors: np.ndarray
) -> dict[str, np.ndarray]:
    """{account: its scores at its checkpoints}."""
    prefixes = [[one.first(count) for count in checkpoints(one)] for one in accounts]
    scores = score([prefix for found in prefixes for prefix in found], vectors)
    ends = np.cumsum([len(found) for found in prefixes])[:-1]
    return {one.name: part for one, part in zip(accounts, np.split(scores, ends), strict=True)}


def alarm(rule: str, account: Account, count: int, p: float) -> Alarm:
    tokens = int(account.tokens[:count].sum())
    return Alarm(rule, account.name, float(account.start[count - 1]), count, tokens, p)


def linked(accounts: list[Account]) -> dict[str, list[Account]]:
    """{program: its accounts}, where several share one."""
    found: dict[str, list[Account]] = {}
    for account in accounts:
        found.setdefault(account.program, []).append(account)
    return {program: members for program, members in found.items() if len(members) >= FEWEST_LINKED}
