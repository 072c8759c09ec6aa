"""Detectors of extraction: how little an account resembles trusted ones.

Each is fitted on trusted accounts and scores others; a higher score is more suspicious. Thresholds
come from trusted accounts that it was not fitted on, none from attacks.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.stats import shapiro
from sklearn.ensemble import IsolationForest
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from measure.usage import FEWEST, Account, PromptSpace, all_features, checkpoints

# (accounts, vectors of the log's prompts) -> scores [N]
Score = Callable[[list[Account], np.ndarray], np.ndarray]
FIRST = 50  # distinct prompts whose diversity counts
LATEST = 1000  # distinct prompts among which the nearest is searched
TIMES = (0.5, 1.0, 2.0, 4.0)  # sizes of the simulated extractors, relative to an account's


@dataclass(frozen=True)
class Trusted:
    """What a detector is fitted on: accounts, and the vectors of their log's prompts."""

    accounts: list[Account]
    space: PromptSpace
    vectors: np.ndarray
    seed: int


def one_by_one(score: Callable[[Account, np.ndarray], float]) -> Score:
    return lambda accounts, vectors: np.array([score(one, vectors) for one in accounts])


def volume(trusted: Trusted) -> Score:
    """The tokens used."""
    return one_by_one(lambda account, vectors: float(account.tokens.sum()))


def diversity(trusted: Trusted) -> Score:
    """Minus the mean cosine between the first prompts."""

    def score(account: Account, vectors: np.ndarray) -> float:
        path = vectors[account.distinct[:FIRST]]
        total, count = path.sum(0), len(path)
        return -float(total @ total - count) / max(1, count * (count - 1))

    return one_by_one(score)


def prada(trusted: Trusted) -> Score:
    """PRADA (Juuti et al. 2019, arXiv 1805.02628, section 6): the distances between new queries and
    the nearest earlier one are normal for customers, and not for synthetic queries. Minus the W of
    the Shapiro-Wilk test. Designed for images."""

    def score(account: Account, vectors: np.ndarray) -> float:
        path = vectors[account.distinct[:LATEST]]
        near = np.tril(path @ path.T, -1)[1:].max(1, initial=-1)
        distances = np.sqrt(np.clip(2 - 2 * near, 0, None))
        varies = len(distances) >= 3 and np.ptp(distances) > 0
        return -float(shapiro(distances).statistic) if varies else -1.0

    return one_by_one(score)


def isolation(trusted: Trusted) -> Score:
    """An isolation forest (Liu et al. 2008) over all features."""
    forest = IsolationForest(n_estimators=200, random_state=trusted.seed)
    forest.fit(all_features(trusted.accounts, trusted.space, trusted.vectors))
    return lambda accounts, vectors: (
        -forest.score_samples(all_features(accounts, trusted.space, vectors))
    )


def simulated(trusted: Trusted) -> Score:
    """Logistic regression between trusted accounts and simulated extractors: for each account, some
    that ask as many prompts or a few times more, all distinct, in random order, drawn from all that
    trusted accounts ask. It sees no real attack, and only sequence features: not when or how an
    account asks."""
    draw = np.random.Generator(np.random.PCG64(trusted.seed))
    known = np.unique(np.concatenate([account.prompts for account in trusted.accounts]))
    sequences, labels = [], []
    for account in trusted.accounts:
        prompts = account.prompts[: draw.choice(checkpoints(account))]
        counts = [int(np.clip(len(prompts) * times, FEWEST, len(known))) for times in TIMES]
        sequences += [prompts, *(draw.choice(known, n, replace=False) for n in counts)]
        labels += [0, *(1 for _ in counts)]

    def features(sequences: list[np.ndarray], vectors: np.ndarray) -> list[list[float]]:
        space = trusted.space
        return [[*space.sequence_features(one, vectors).values()] for one in sequences]

    model = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced"))
    model.fit(features(sequences, trusted.vectors), labels)
    return lambda accounts, vectors: model.decision_function(
        features([one.prompts for one in accounts], vectors)
    )


DETECTORS: dict[str, Callable[[Trusted], Score]] = {
    "volume": volume,
    "diversity": diversity,
    "prada": prada,
    "isolation": isolation,
    "simulated": simulated,
}
