"""How good alarms are, over made-up traffic whose kinds are known.

    python -m measure.detection runs/traffic-*.sqlite --out results/extraction.json

Alarms are raised first, from the log alone; then the labels beside it are read.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import beta
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.metrics import roc_auc_score

from configs.files import read_json, say, write_json
from configs.schema import LabError
from measure.alarms import AS_IT_GOES, AT_THE_END, DEFAULT, RULES, TOGETHER, Alarm, Watch
from measure.detectors import DETECTORS
from measure.usage import Log, Map, described, read_log
from teacher.api.traffic import ATTACKS, BENIGN

FALSE_ALARMS = 0.01
# What was decided before the study was run: {(rule, kind): the least share that is found}.
WANTED = {
    (AS_IT_GOES, "naive"): 0.95,
    (AT_THE_END, "throttled"): 0.75,
    (AT_THE_END, "hydra"): 0.30,
    (TOGETHER, "hydra"): 0.95,
}
MOST_FALSE = 0.02  # of customers, at a nominal rate of FALSE_ALARMS
LEAST_AUC = 0.95
MOST_TOKENS = 10_000  # that a naive extractor may have before the alarm


@dataclass(frozen=True)
class Rate:
    """found of total, with an interval (Clopper and Pearson 1934)."""

    found: int
    total: int

    def __add__(self, other: "Rate") -> "Rate":
        return Rate(self.found + other.found, self.total + other.total)

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

    def summary(self) -> dict[str, Any]:
        return {"found": self.found, "of": self.total, "ci95": [*self.interval()]}


@dataclass(frozen=True)
class Scored:
    """A log with its alarms. rates: {rule: {kind, or `customers`: how many raised an alarm}};
    tokens: {kind: what each had at its first alarm as it went}; auc: of the final scores, attackers
    against customers."""

    rates: dict[str, dict[str, Rate]]
    tokens: dict[str, list[int]] = field(repr=False)
    auc: float


def before_of(log: Path) -> Path:
    """The log of customers of before that was made with another."""
    return log.with_suffix(".before.sqlite")


def kinds_of(log: Path) -> dict[str, str]:
    """{account: kind}. LabError for a log that was not made up."""
    file = log.with_suffix(".labels.json")
    if not file.is_file():
        raise LabError(f"no {file}: who was what is known of made-up traffic only")
    return {name: label["kind"] for name, label in read_json(file, dict).items()}


def scored(watch: Watch, log: Log, alarms: list[Alarm], kinds: dict[str, str]) -> Scored:
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
        if one.rule == AS_IT_GOES:
            first.setdefault(one.account, one.tokens)
    tokens = {
        kind: sorted(count for name, count in first.items() if kinds[name] == kind)
        for kind in ATTACKS
    }
    scores = watch.final_scores(log)
    known = [name for name in scores if name in kinds]
    is_attack = [kinds[name] in ATTACKS for name in known]
    auc = float(roc_auc_score(is_attack, [scores[name] for name in known])) if any(is_attack) else 0
    return Scored(rates, tokens, auc)


def together(logs: Sequence[Scored]) -> Scored:
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
    found = together(logs)
    lines = [f"{'alarms of':<14}" + "".join(f"{rule:>22}" for rule in RULES) + "   tokens by then"]
    for kind in found.rates[AS_IT_GOES]:
        cells = ""
        for rule in RULES:
            rate = found.rates[rule][kind]
            low, high = rate.interval()
            cells += f"{f'{rate.share:.1%} ({low:.1%}-{high:.1%})':>22}"
        middle = f"{int(np.median(found.tokens[kind])):,}" if found.tokens.get(kind) else ""
        lines.append(f"{kind:<14}{cells}{middle:>17}".rstrip())
    return "\n".join(lines)


# -- a detector that has seen attacks --------------------------------------------------------------


def seen_attacks(
    logs: Sequence[tuple[Log, Log, dict[str, str]]], left_out: str | None, seed: int = 0
) -> Rate:
    """Gradient boosting on the kinds of the other logs: how many attackers it finds at the end, by
    a threshold from each log's customers before. left_out: the one kind of attack that is looked
    for and was not trained on; None: all were, and all are looked for, which is circular."""
    total = Rate(0, 0)
    for number, (before, log, kinds) in enumerate(logs):
        shape = Map(before.prompts, seed)
        described_logs = [
            (described(other, Map(earlier.prompts, seed)), theirs)
            for i, (earlier, other, theirs) in enumerate(logs)
            if i != number
        ]
        x, y = [], []
        for accounts, theirs in described_logs:
            for name, values in accounts.items():
                if theirs[name] != left_out:
                    x.append(values)
                    y.append(theirs[name] in ATTACKS)
        model = HistGradientBoostingClassifier(random_state=seed).fit(x, y)
        customers = model.decision_function([*described(before, shape).values()])
        place = int(np.ceil((len(customers) + 1) * (1 - FALSE_ALARMS))) - 1
        threshold = np.sort(customers)[min(place, len(customers) - 1)]
        looked_for = {
            name: values
            for name, values in described(log, shape).items()
            if kinds[name] in ATTACKS and left_out in (None, kinds[name])
        }
        scores = model.decision_function([*looked_for.values()])
        total += Rate(int((scores > threshold).sum()), len(scores))
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
            watch = Watch(before, name, FALSE_ALARMS, seed=number)
            each.append(scored(watch, log, [*watch.alarms(log)], kinds))
        found[name] = together(each)
        progress(f"{name}\n{table_of([found[name]])}\n")
    supervised = {}
    if len(logs) > 1:
        supervised = {"all": seen_attacks(logs, None).summary()}
        supervised |= {kind: seen_attacks(logs, kind).summary() for kind in ATTACKS}
    return {
        "schema": 1,
        "logs": len(logs),
        "accounts": sum(len(kinds) for _, _, kinds in logs),
        "requests": sum(len(account) for _, log, _ in logs for account in log.accounts),
        "false_alarms": FALSE_ALARMS,
        "detectors": {name: summary_of(one) for name, one in found.items()},
        "left_out": supervised,
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
    claims = []
    for (rule, kind), least in WANTED.items():
        low, high = one.rates[rule][kind].interval()
        said = f"at least {least:.0%} of {kind} accounts raise an alarm {rule}"
        claims.append(claim(said, low >= least, high < least))
    for rule in (AS_IT_GOES, AT_THE_END):
        low, high = one.rates[rule]["customers"].interval()
        said = f"at most {MOST_FALSE:.0%} of customers raise an alarm {rule}"
        claims.append(claim(said, high <= MOST_FALSE, low > MOST_FALSE))
    enough, middle = one.auc >= LEAST_AUC, quartiles(one.tokens["naive"])
    claims.append(claim(f"the AUC at the end is at least {LEAST_AUC}", enough, not enough))
    early = middle is not None and middle[1] < MOST_TOKENS
    said = f"half of the naive extractors have fewer than {MOST_TOKENS:,} tokens at the alarm"
    claims.append(claim(said, early, not early))
    return claims


def claim(said: str, supported: bool, refuted: bool) -> dict[str, Any]:
    result = "supported" if supported else "refuted" if refuted else "not decided"
    return {"claim": said, "result": result}


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        "python -m measure.detection", description=__doc__.splitlines()[0]
    )
    found.add_argument("logs", type=Path, nargs="+", help="made by python -m teacher.api traffic")
    found.add_argument("--out", type=Path, help="a JSON file")
    return found


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    logs = [log for log in options.logs if not log.name.endswith(".before.sqlite")]
    try:
        found = study(logs)
    except LabError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for one in found["claims"]:
        say(f"{one['result']}: {one['claim']}")
    if options.out:
        write_json(options.out, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
