# %% [markdown]
# # Lab 3: Does it help?
#
# A distilled student model that beats a baseline shows nothing if the baseline had fewer FLOPs, a
# learning rate that suits the other, another choice of seed, or if the winner was chosen on the
# test set. In this lab you write the four rules that decide, and then apply them to a run of 27
# methods that somebody else has made.
#
# About 60 minutes of yours, no CPU to speak of: the results are in `results/`.

# %%
import numpy as np
from scipy import stats

from labs.results import committed_result

# %%
PREDICTIONS = {
    # solution
    "3.1": "b",
    "3.2": "c",
    "3.3": "a",
    "3.4": "b",
    # stub "3.1": "?",
    # stub "3.2": "?",
    # stub "3.3": "?",
    # stub "3.4": "?",
    # end
}

# %% [markdown]
# ## Exercise 3.1: equal cost
#
# Easy · 10 minutes · no CPU
#
# **Goal.** How many steps a student may train, if it may cost a fraction of the teacher's training
# and its outputs are paid from the same budget.
#
# **Formula.** $\lfloor (f \cdot F_\text{teacher} - F_\text{outputs}) / F_\text{step} \rfloor$
#
# **Predict first.** A baseline that needs no outputs, at the same budget, trains for (a) as many
# steps, (b) more steps, (c) fewer steps than the student.
#
# **Check.** `python -m pytest labs/checks/lab3 --mine -k steps`
#
# <details><summary>Hint 1</summary>What is left of the budget after the outputs?</details>
# <details><summary>Hint 2</summary>Half a step cannot be made.</details>
# <details><summary>Hint 3</summary><code>int(left // flops_per_step)</code>, and never below
# 0.</details>


# %% exercise 3.1
def steps_at_equal_cost(
    teacher_flops: float, fraction: float, outputs_flops: float, flops_per_step: float
) -> int:
    """The steps that a budget allows; 0 if the outputs have used it up."""
    # solution
    return max(0, int((fraction * teacher_flops - outputs_flops) // flops_per_step))
    # end


# %% [markdown]
# ## Exercise 3.2: the interval of a difference
#
# Medium · 15 minutes · no CPU
#
# Two methods were trained from the same seeds. Each seed gives one difference.
#
# **Goal.** A 95 % interval for the mean difference.
#
# **Formula.** $\bar d \pm t_{0.975, n-1} \cdot s / \sqrt n$ with the standard deviation $s$ of the
# $n$ differences, divided by $n - 1$.
#
# **Predict first.** With 3 seeds, using 1.96 instead of $t$ gives an interval that holds the truth
# in (a) 95 %, (b) 93 %, (c) about 81 % of cases.
#
# **Check.** `python -m pytest labs/checks/lab3 --mine -k interval`
#
# <details><summary>Hint 1</summary>NumPy's <code>std</code> divides by n unless you say
# <code>ddof=1</code>.</details>
# <details><summary>Hint 2</summary><code>stats.t.ppf(0.975, n - 1)</code></details>
# <details><summary>Hint 3</summary>Divide the standard deviation by the square root of n.
# </details>


# %% exercise 3.2
def interval(differences: list[float]) -> tuple[float, float]:
    """(low, high) of the mean difference, from one difference per seed; at least two."""
    # solution
    values = np.asarray(differences)
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return float(values.mean() - half), float(values.mean() + half)
    # end


# %% [markdown]
# ## Exercise 3.3: the rule
#
# Easy · 10 minutes · no CPU
#
# **Goal.** Decide, by a rule that is written before the run.
#
# **Formula.** `better` if the whole interval is on the side that is better for the metric, `worse`
# if it is on the other side, else `not distinguished`.
#
# **Predict first.** `not distinguished` says that (a) these seeds do not decide, (b) both are
# equally good, (c) the method does not work.
#
# **Check.** `python -m pytest labs/checks/lab3 --mine -k rule`
#
# <details><summary>Hint 1</summary>For word errors, lower is better: a negative difference
# wins.</details>
# <details><summary>Hint 2</summary>An interval that touches 0 does not decide.</details>
# <details><summary>Hint 3</summary>Turn the interval around first where lower is better.</details>


# %% exercise 3.3
def rule(low: float, high: float, lower_is_better: bool) -> str:
    """The result of a claim `first beats second`, from the interval of first minus second."""
    # solution
    if lower_is_better:
        low, high = -high, -low
    return "better" if low > 0 else "worse" if high < 0 else "not distinguished"
    # end


# %% [markdown]
# ## Exercise 3.4: equal tuning
#
# Easy · 10 minutes · no CPU
#
# Every method had the same number of tries. Each try has its errors on the validation split and on
# the test split.
#
# **Goal.** The try that is used.
#
# **Predict first.** A choice by test errors makes the reported errors (a) right on average, (b) too
# low on average, (c) too high on average.
#
# **Check.** `python -m pytest labs/checks/lab3 --mine -k tuning`
#
# <details><summary>Hint 1</summary>Which of the two may a choice see?</details>
# <details><summary>Hint 2</summary><code>min(range(n), key=...)</code></details>
# <details><summary>Hint 3</summary>The test errors are not needed.</details>


# %% exercise 3.4
def chosen(validation_errors: list[float], test_errors: list[float]) -> int:
    """The number of the try that is used, counted from 0."""
    # solution
    return int(np.argmin(validation_errors))
    # end


# %% [markdown]
# ## Read a run
#
# `results/methods.json` holds 27 methods, 5 seeds each, all tuned with as many tries and at equal
# FLOPs. Which of them beat the baseline in agreement with the teacher?


# %%
def main() -> None:
    result = committed_result("methods")
    metric = "sequence_agreement"
    baseline = result["controls"]["baseline"]["fidelity"][metric]["per_seed"]
    for name, entry in result["students"].items():
        values = entry["fidelity"][metric]["per_seed"]
        if len(values) == len(baseline):
            low, high = interval([a - b for a, b in zip(values, baseline, strict=True)])
            verdict = rule(low, high, lower_is_better=False)
            print(f"{name:<20} {100 * low:+6.1f} to {100 * high:+6.1f} points: {verdict}")


# %%
if __name__ == "__main__":
    main()

# %% [markdown]
# You have made 27 comparisons: one in twenty is `better` or `worse` by chance. The project corrects
# for that (Dunnett's test, see `docs/statistics.md`), and it counts the words, too, which all seeds
# share.
#
# **Deliverable.** Your functions and predictions; and your own verdict on one method of the table,
# with what would change your mind.
