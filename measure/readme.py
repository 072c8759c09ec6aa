"""The tables in README.md: written from results/ by `eval.py RUN --update`, compared by a test."""

import json
import re
from pathlib import Path
from typing import Any

from measure.statistics import verdict_line

BLOCK = re.compile(r"(<!-- results/(\S+)\.json -->\n).*?(<!-- end -->)", re.DOTALL)
COLUMNS = {
    "word errors %": ("quality", "word_error_rate", 100, 1),
    "phoneme errors %": ("quality", "phoneme_error_rate", 100, 1),
    "same answer as the teacher %": ("fidelity", "sequence_agreement", 100, 1),
    "of its errors, copied %": ("fidelity", "agreement_on_teacher_errors", 100, 1),
    "KL to the teacher, nats": ("fidelity", "kl_teacher_student", 1, 3),
}


def with_tables(readme: str, results: Path) -> str:
    """The text with every block `<!-- results/NAME.json --> ... <!-- end -->` written anew."""

    def block(match: re.Match) -> str:
        file = results / f"{match[2]}.json"
        if not file.exists():
            return match[0]
        return match[1] + summary(json.loads(file.read_text(encoding="utf-8"))) + match[3]

    return BLOCK.sub(block, readme)


def summary(result: dict[str, Any]) -> str:
    """One result as a Markdown table, its verdicts and its cost."""
    arms = {"teacher": result["teacher"], **result["students"], **result["controls"]}
    headings = ["", "parameters", "TFLOPs", *COLUMNS]
    lines = [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
    for arm, entry in arms.items():
        cells = [arm, f"{entry['params']:,}", f"{entry['cost']['flops'] / 1e12:.2f}"]
        for group, key, scale, digits in COLUMNS.values():
            metric = entry[group].get(key)
            cells.append("" if metric is None else f"{scale * metric['mean']:.{digits}f}")
        lines.append(f"| {' | '.join(cells)} |")
    seeds = len(result["seeds"])
    fraction = result["cost"]["fraction_of_teacher"]["flops"]
    minutes = sum(stage["seconds"] for stage in result["cost"]["stages"]) / 60
    facts = [verdict_line(verdict) for verdict in result["verdicts"]]
    for arm, shares in result["gaps"].items():
        for gap, share in shares.items():
            if share["share"] is not None:
                low, high = (100 * bound for bound in share["ci95"])
                facts.append(
                    f"{arm} closes {100 * share['share']:.0f} % [{low:.0f}, {high:.0f}] of the gap "
                    f"{gap.replace('_', ' ')} in word errors"
                )
    facts += [
        f"outputs + one student = {100 * fraction:.1f} % of the teacher's training FLOPs",
        f"{seeds} seed{'s' if seeds > 1 else ''}, {minutes:.0f} minutes of training and judging "
        f"with {result['environment']['trained']['threads']} threads",
    ]
    return "\n".join([*lines, "", *(f"- {fact}" for fact in facts), ""])
