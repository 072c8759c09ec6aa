"""Evaluate detectors on made-up traffic, where the kind of each account is known.

    python -m measure.detection runs/traffic-*.sqlite --out results/extraction.json

Alarms are raised from the log alone, before its labels are read.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.metrics import roc_auc_score

from configs.command import run_command
from configs.files import read_json, say
from configs.schema import LabError
from measure.alarms import DEFAULT, FINAL, LINKED, RULES, SEQUENTIAL, Alarm, Monitor
from measure.detectors import DETECTORS
from measure.rates import Rate, at_least, at_most, between, claim
from measure.report.documents import publish_study
from measure.usage import Log, PromptSpace, all_features, read_log
from teacher.api.traffic import ATTACKS, BENIGN

FALSE_ALARMS = 0.01
# The claims, fixed before the study was run: {(rule, kind): the least share that is found}.
CLAIMED = {
    (SEQUENTIAL, "naive"): 0.95,
    (FINAL, "throttled"): 0.75,
    (FINAL, "hydra"): 0.30,
    (LINKED, "hydra"): 0.95,
}
MOST_FALSE = 0.02  # of customers, at a nominal rate of FALSE_ALARMS
LEAST_AUC = 0.95
MOST_TOKENS = 10_000  # of the median naive extractor at its alarm


@dataclass(frozen=True)
class Scored:
    """A log's alarms, evaluated. rates: {rule: {kind, or `customers`: accounts with an alarm}};
    tokens: {kind: those of each account at its sequential alarm}; auc: of the final scores,
    extractors against customers."""

    rates: dict[str, dict[str, Rate]]
    tokens: dict[str, list[int]] = field(repr=False)
    auc: float


def before_of(log: Path) -> Path:
    """The log of trusted accounts that was made with another."""
    return log.with_suffix(".before.sqlite")


def kinds_of(log: Path) -> dict[str, str]:
    """{account: kind}. LabError for a log that was not made up."""
    file = log.with_suffix(".labels.json")
    if not file.is_file():
        raise LabError(f"no {file}: only made-up traffic has labels")
    return {name: label["kind"] for name, label in read_json(file, dict).items()}


def scored(monitor: Monitor, log: Log, alarms: list[Alarm], kinds: dict[str, str]) -> Scored:
    groups = {"customers": {*BENIGN}} | {kind: {kind} for kind in (*BENIGN, *ATTACKS)}
    rates = {}
    for rule in RULES:
        raised = {one.account for one in alarms if one.rule == rule}
        raised |= {name for one in alarms if one.rule == rule for name in one.members}
        rates[rule] = {
            group: Rate(
                sum(kind in members and name in raised for name, kind in kinds.items()),
                sum(kind in members for kind in kinds.values()),
            )
            for group, members in groups.items()
        }
    first: dict[str, int] = {}
    for one in alarms:
        if one.rule == SEQUENTIAL:
            first.setdefault(one.account, one.tokens)
    tokens = {
        kind: sorted(count for name, count in first.items() if kinds.get(name) == kind)
        for kind in ATTACKS
    }
    scores = monitor.final_scores(log)
    known = [name for name in scores if name in kinds]
    is_attack = [kinds[name] in ATTACKS for name in known]
    auc = float(roc_auc_score(is_attack, [scores[name] for name in known])) if any(is_attack) else 0
    return Scored(rates, tokens, auc)


def combined(logs: Sequence[Scored]) -> Scored:
    """Several logs as one."""
    first, *others = logs
    rates, tokens = first.rates, first.tokens
    for one in others:
        rates = {
            rule: {kind: rate + one.rates[rule][kind] for kind, rate in found.items()}
            for rule, found in rates.items()
        }
        tokens = {kind: sorted([*found, *one.tokens[kind]]) for kind, found in tokens.items()}
    return Scored(rates, tokens, float(np.mean([one.auc for one in logs])))


def table_of(logs: Sequence[Scored]) -> str:
    found = combined(logs)
    lines = [f"{'alarms of':<14}" + "".join(f"{rule:>22}" for rule in RULES) + "   tokens by then"]
    for kind in found.rates[SEQUENTIAL]:
        cells = ""
        for rule in RULES:
            cells += f"{found.rates[rule][kind]!s:>22}"
        middle = f"{int(np.median(found.tokens[kind])):,}" if found.tokens.get(kind) else ""
        lines.append(f"{kind:<14}{cells}{middle:>17}".rstrip())
    return "\n".join(lines)


# -- a supervised detector -------------------------------------------------------------------------


def supervised(
    logs: Sequence[tuple[Log, Log, dict[str, str]]], left_out: str | None, seed: int = 0
) -> Rate:
    """The extractors that gradient boosting finds in each log, trained on the labels of the others,
    with a threshold from the log's trusted accounts. left_out: the kind of attack that is not in
    training and is looked for; None: all are in both, which is circular."""
    total = Rate(0, 0)
    for number, (trusted, log, kinds) in enumerate(logs):
        space = PromptSpace(trusted.prompts, seed)
        training = [(other, theirs) for i, (_, other, theirs) in enumerate(logs) if i != number]
        x, y = [], []
        for other, theirs in training:
            vectors = space.vectors(other.prompts)
            kept = [one for one in other.scored if theirs[one.name] != left_out]
            x += all_features(kept, space, vectors)
            y += [theirs[one.name] in ATTACKS for one in kept]
        model = HistGradientBoostingClassifier(random_state=seed).fit(x, y)

        known = all_features(trusted.scored, space, space.vectors(trusted.prompts))
        customers = np.sort(model.decision_function(known))
        place = int(np.ceil((len(customers) + 1) * (1 - FALSE_ALARMS))) - 1
        threshold = customers[min(place, len(customers) - 1)]
        wanted = [
            one
            for one in log.scored
            if kinds[one.name] in ATTACKS and left_out in (None, kinds[one.name])
        ]
        if wanted:
            found = model.decision_function(all_features(wanted, space, space.vectors(log.prompts)))
            total += Rate(int((found > threshold).sum()), len(found))
    return total


# -- the study -------------------------------------------------------------------------------------


def study(files: Sequence[Path], progress: Any = say) -> dict[str, Any]:
    """Every detector over several logs, each with its customers before. A claim is supported if the
    whole 95 % interval of its rate is on the right side, and refuted if it is on the wrong one."""
    logs = [(read_log(before_of(file)), read_log(file), kinds_of(file)) for file in files]
    found: dict[str, Scored] = {}
    for name in DETECTORS:
        each = []
        for number, (before, log, kinds) in enumerate(logs):
            monitor = Monitor(before, name, FALSE_ALARMS, seed=number)
            each.append(scored(monitor, log, [*monitor.alarms(log)], kinds))
        found[name] = combined(each)
        progress(f"{name}\n{table_of([found[name]])}\n")
    boosted = {}
    if len(logs) > 1:
        boosted = {"all": supervised(logs, None).summary()}
        boosted |= {kind: supervised(logs, kind).summary() for kind in ATTACKS}
    return {
        "schema": 1,
        "logs": len(logs),
        "accounts": sum(len(kinds) for _, _, kinds in logs),
        "requests": sum(len(account) for _, log, _ in logs for account in log.accounts),
        "false_alarms": FALSE_ALARMS,
        "detectors": {name: summary_of(one) for name, one in found.items()},
        "supervised": boosted,
        "claims": claims_of(found[DEFAULT]),
    }


def summary_of(one: Scored) -> dict[str, Any]:
    return {
        "auc": round(one.auc, 4),
        "rates": {
            rule: {kind: rate.summary() for kind, rate in rates.items()}
            for rule, rates in one.rates.items()
        },
        "tokens": {kind: quartiles(found) for kind, found in one.tokens.items()},
    }


def quartiles(values: list[int]) -> list[float] | None:
    return [float(q) for q in np.quantile(values, [0.25, 0.5, 0.75])] if values else None


def claims_of(one: Scored) -> list[dict[str, Any]]:
    claims = [
        at_least(
            f"at least {least:.0%} of {kind} accounts raise a {rule} alarm",
            one.rates[rule][kind],
            least,
        )
        for (rule, kind), least in CLAIMED.items()
    ]
    claims += [
        at_most(
            f"at most {MOST_FALSE:.0%} of customers raise a {rule} alarm",
            one.rates[rule]["customers"],
            MOST_FALSE,
        )
        for rule in (SEQUENTIAL, FINAL)
    ]
    middle = quartiles(one.tokens["naive"])
    claims += [
        between(
            f"the AUC of the final scores is at least {LEAST_AUC}", one.auc, LEAST_AUC, math.inf
        ),
    ]
    early = middle is not None and middle[1] < MOST_TOKENS
    statement = f"half of the naive extractors have fewer than {MOST_TOKENS:,} tokens at the alarm"
    return [*claims, claim(statement, early, not early)]


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        "python -m measure.detection", description=__doc__.splitlines()[0]
    )
    found.add_argument("logs", type=Path, nargs="+", help="made by python -m teacher.api traffic")
    found.add_argument("--out", type=Path, help="a JSON file; pages that show it are rewritten")
    return found


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    return run_command(lambda: run(options), "nothing was written")


def run(options: argparse.Namespace) -> int:
    found = study([log for log in options.logs if not log.name.endswith(".before.sqlite")])
    publish_study(found, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
