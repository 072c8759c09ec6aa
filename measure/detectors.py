"""Detectors of extraction: how little an account resembles the customers of before.

Each is fitted on the log of customers that are trusted, and gives an account a score; the higher,
the more suspicious. Thresholds come from other trusted accounts, none from attacks.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.stats import shapiro
from sklearn.ensemble import IsolationForest
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from measure.usage import FEWEST, Account, Map, checkpoints, manner

# The scores [N] of accounts, by the vectors of the log's prompts
Score = Callable[[list[Account], np.ndarray], np.ndarray]
FIRST = 50  # distinct prompts whose subjects are counted
LATEST = 1000  # distinct prompts among which the nearest is looked for
TIMES = (0.5, 1.0, 2.0, 4.0)  # how much more a counterpart asks than the customer


@dataclass(frozen=True)
class Trusted:
    """Customers that a detector learns from, the map of what they ask, and a seed."""

    accounts: list[Account]
    map: Map
    seed: int


def one_by_one(score: Callable[[Account, np.ndarray], float]) -> Score:
    return lambda accounts, vectors: np.array([score(one, vectors) for one in accounts])


def volume(trusted: Trusted) -> Score:
    """Tokens so far."""
    return one_by_one(lambda account, vectors: float(account.tokens.sum()))


def subjects(trusted: Trusted) -> Score:
    """How unlike each other the first prompts are: their mean cosine."""

    def score(account: Account, vectors: np.ndarray) -> float:
        path = vectors[account.distinct[:FIRST]]
        total, count = path.sum(0), len(path)
        return -float(total @ total - count) / max(1, count * (count - 1))

    return one_by_one(score)


def prada(trusted: Trusted) -> Score:
    """PRADA (Juuti et al. 2019, arXiv 1805.02628, section 6): distances of new queries from the
    nearest earlier one are normal for customers, and not for queries that were made up. W of the
    test of Shapiro and Wilk. Made for images."""

    def score(account: Account, vectors: np.ndarray) -> float:
        path = vectors[account.distinct[:LATEST]]
        near = np.tril(path @ path.T, -1)[1:].max(1, initial=-1)
        distances = np.sqrt(np.clip(2 - 2 * near, 0, None))
        varies = len(distances) >= 3 and np.ptp(distances) > 0
        return -float(shapiro(distances).statistic) if varies else -1.0

    return one_by_one(score)


def isolation(trusted: Trusted) -> Score:
    """An isolation forest (Liu et al. 2008) over all that describes an account."""

    def described(accounts: list[Account], vectors: np.ndarray) -> list[list[float]]:
        return [
            [*manner(one).values(), *trusted.map.walk(one.prompts, vectors).values()]
            for one in accounts
        ]

    forest = IsolationForest(n_estimators=200, random_state=trusted.seed)
    forest.fit(described(trusted.accounts, trusted.map.vectors))
    return lambda accounts, vectors: -forest.score_samples(described(accounts, vectors))


def counterparts(trusted: Trusted) -> Score:
    """A classifier of customers and of their counterparts, who ask everything there is: as many
    prompts or a few times more, no two alike, in no order. It is shown no attack, only what
    customers ask, and judges how an account walks, not when or for how much."""
    draw = np.random.Generator(np.random.PCG64(trusted.seed))
    vectors, paths, labels = trusted.map.vectors, [], []
    for account in trusted.accounts:
        prompts = account.prompts[: draw.choice(checkpoints(account))]
        counts = [int(np.clip(len(prompts) * n, FEWEST, len(vectors))) for n in TIMES]
        paths += [prompts, *(draw.choice(len(vectors), n, replace=False) for n in counts)]
        labels += [0, *(1 for _ in counts)]
    model = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced"))
    model.fit([[*trusted.map.walk(path, vectors).values()] for path in paths], labels)
    return lambda accounts, vectors: model.decision_function(
        [[*trusted.map.walk(one.prompts, vectors).values()] for one in accounts]
    )


DETECTORS: dict[str, Callable[[Trusted], Score]] = {
    "volume": volume,
    "subjects": subjects,
    "prada": prada,
    "isolation": isolation,
    "counterparts": counterparts,
}
