# %% [markdown]
# # Lab 8: Watermarks and evidence
#
# An owner marks what a model writes, so that its students show whom they learned from. You make the
# mark, find it, and learn why a test that looks right is not. Then a blind trial: which of these
# students were taught by whom, and whom must you not accuse (Kirchenbauer et al. 2023, arXiv
# 2301.10226; Sander et al. 2024, arXiv 2402.14904)?
#
# About 75 minutes of yours, 10 seconds of CPU.

# %%
import numpy as np
import torch
from scipy import stats
from torch import Tensor

from labs.results import new_picture, save_picture

# %%
PREDICTIONS = {
    # solution
    "8.1": "b",
    "8.2": "a",
    "8.3": "b",
    "8.4": "b",
    "8.5": "c",
    # stub "8.1": "?",
    # stub "8.2": "?",
    # stub "8.3": "?",
    # stub "8.4": "?",
    # stub "8.5": "?",
    # end
}

# %% [markdown]
# ## Exercise 8.1: the mark
#
# Easy · 10 minutes · no CPU
#
# A secret key decides, for every token, which quarter of the vocabulary is green after it.
#
# **Goal.** The distribution that a marked model draws from.
#
# **Formula.** The logits of green tokens are raised by a bias $\delta$, then normalised.
#
# **Predict first.** All tokens are equally likely, a quarter is green, and $\delta = 2$. A green
# token comes with probability (a) 0.5, (b) 0.71, (c) 0.95.
#
# **Check.** `python -m pytest labs/checks/lab8 --mine -k mark`
#
# <details><summary>Hint 1</summary>Log-probabilities are logits, too.</details>
# <details><summary>Hint 2</summary><code>log_probs + bias * green</code></details>
# <details><summary>Hint 3</summary>Normalise with <code>log_softmax</code>; otherwise the sum is
# above 1.</details>


# %% exercise 8.1
def marked(log_probs: Tensor, green: Tensor, bias: float) -> Tensor:
    """Log-probabilities [V] of the next token with the mark; green [V]: 1 or 0."""
    # solution
    return torch.log_softmax(log_probs + bias * green, dim=-1)
    # end


# %% [markdown]
# ## Exercise 8.2: a test that is valid for any text
#
# Hard · 20 minutes · no CPU
#
# The obvious test counts green tokens and takes each for a coin that falls on green in a quarter of
# the cases. A student repeats pairs of tokens, though, and every repetition of a pair falls on the
# same side. What is random in a valid test is the key alone.
#
# **Goal.** $z$ of a table of counts: how many standard deviations the green ones exceed what a
# random key would give.
#
# **Formula.** $D_{ij}$ is how often token $j$ came after token $i$; take from every row its mean:
# $C$. With $\gamma$ the share of green tokens in a row,
# $z = \sum C_{ij} G_{ij} / \sqrt{\gamma (1 - \gamma) \frac{V}{V - 1} \sum C_{ij}^2}$.
#
# **Predict first.** On a long text of an innocent student, the obvious test with many keys gives z
# with a standard deviation (a) far above 1, (b) of 1, (c) far below 1.
#
# **Check.** `python -m pytest labs/checks/lab8 --mine -k valid`
#
# <details><summary>Hint 1</summary><code>D - D.mean(1, keepdim=True)</code></details>
# <details><summary>Hint 2</summary>A green list is drawn without replacement, hence V / (V - 1).
# Do not assume a quarter: count.</details>
# <details><summary>Hint 3</summary>Both sums go over the whole table.</details>


# %% exercise 8.2
def z_of(counts: Tensor, green: Tensor) -> float:
    """counts [V, V]; green [V, V]: 1 where a token is green after another, equally many in each
    row."""
    # solution
    vocabulary, share = len(counts), float(green[0].float().mean())
    centred = counts - counts.mean(1, keepdim=True)
    variance = share * (1 - share) * vocabulary / (vocabulary - 1) * centred.square().sum()
    return float((centred * green).sum() / variance.sqrt())
    # end


# %% [markdown]
# ## Exercise 8.3: the rank among other keys
#
# Easy · 10 minutes · no CPU
#
# **Goal.** A p-value that needs no normal distribution: how many random keys give at least this z.
#
# **Formula.** $p = (1 + \#\{k : z_k \ge z\}) / (K + 1)$ with $K$ other keys.
#
# **Predict first.** With 99 other keys the smallest possible p is (a) 0, (b) 0.01, (c) 1/99.
#
# **Check.** `python -m pytest labs/checks/lab8 --mine -k rank`
#
# <details><summary>Hint 1</summary>The true key is one of K + 1.</details>
# <details><summary>Hint 2</summary>At least: a tie counts against the accusation.</details>
# <details><summary>Hint 3</summary><code>sum(other >= z for other in others)</code></details>


# %% exercise 8.3
def rank_p(z: float, others: list[float]) -> float:
    # solution
    return (1 + sum(other >= z for other in others)) / (1 + len(others))
    # end


# %% [markdown]
# ## Exercise 8.4: closer than chance?
#
# Medium · 20 minutes · no CPU
#
# Without a mark, one compares how close a student is to a teacher with how close innocent students
# are: the larger the number, the closer. Two students that differ only in their seed are not
# equally close. What follows assumes that innocent students are about normal, and drawn like the
# new one.
#
# **Goal.** p that one more innocent student would be at least as close.
#
# **Formula.** With $K$ innocent students of mean $m$ and standard deviation $s$ (divided by
# $K - 1$), $t = (x - m) / (s \sqrt{1 + 1/K})$, and p is the tail of Student's t with $K - 1$
# degrees of freedom.
#
# **Predict first.** With one innocent student and a million prompts, a paired test over prompts (a)
# is valid, (b) accuses innocent students of another seed, (c) accuses nobody.
#
# **Check.** `python -m pytest labs/checks/lab8 --mine -k closer`
#
# <details><summary>Hint 1</summary>The unit is the training run, not the prompt.</details>
# <details><summary>Hint 2</summary>1 + 1/K: the new student varies, and so does the mean.</details>
# <details><summary>Hint 3</summary><code>stats.t.sf(t, K - 1)</code></details>


# %% exercise 8.4
def p_of_closeness(student: float, innocent: list[float]) -> float:
    """From the closeness of a student to a teacher and that of innocent students to the same."""
    # solution
    known = np.asarray(innocent)
    spread = known.std(ddof=1) * (1 + 1 / len(known)) ** 0.5
    return float(stats.t.sf((student - known.mean()) / spread, len(known) - 1))
    # end


# %% [markdown]
# ## Exercise 8.5: the blind trial
#
# Medium · 15 minutes · 5 seconds of CPU
#
# Each student has its closeness to every candidate. Some were taught by one of them, some by
# nobody, some by a teacher that is not listed.
#
# **Goal.** A verdict on each student: the name of a candidate, or `none`.
#
# **Formula.** Subtract from the closeness to each candidate the same student's mean closeness to
# the other candidates: what all good students share cancels. Correct p for the number of
# candidates. Accuse at p ≤ 0.001: a wrong accusation is worse than none.
#
# **Predict first.** A student of a teacher that is not listed should be (a) given to the closest
# candidate, (b) given to all, (c) given to none.
#
# **Check.** `python -m pytest labs/checks/lab8 --mine -k trial`
#
# <details><summary>Hint 1</summary>Do the same to the innocent students as to the
# student.</details>
# <details><summary>Hint 2</summary>Multiply p by the number of candidates.</details>
# <details><summary>Hint 3</summary>If several are below, take the smallest.</details>


# %% exercise 8.5
def verdict(student: dict[str, float], innocent: list[dict[str, float]]) -> str:
    """From the closeness to every candidate, of a student and of innocent ones."""

    # solution
    def relative(values: dict[str, float]) -> dict[str, float]:
        return {
            name: value - float(np.mean([v for other, v in values.items() if other != name]))
            for name, value in values.items()
        }

    found, known = relative(student), [relative(one) for one in innocent]
    ps = {name: p_of_closeness(found[name], [one[name] for one in known]) for name in found}
    best = min(ps, key=ps.get)
    return best if len(ps) * ps[best] <= 0.001 else "none"
    # end


# %%
def main() -> None:
    generator, vocabulary = torch.Generator().manual_seed(0), 64
    green = torch.stack([
        torch.randperm(vocabulary, generator=generator) < vocabulary // 4
        for _ in range(vocabulary)
    ]).float()  # fmt: skip
    axes = new_picture()
    for bias in (0.0, 0.5, 1.0, 2.0):
        counts, last, points = torch.zeros(vocabulary, vocabulary), 1, []
        for tokens in range(1, 2_001):
            log_probs = marked(torch.zeros(vocabulary), green[last], bias)
            token = int(torch.multinomial(log_probs.exp(), 1, generator=generator))
            counts[last, token] += 1
            last = token
            if tokens % 100 == 0:
                points.append((tokens, z_of(counts, green)))
        axes.plot(*zip(*points, strict=True), label=f"bias {bias:g}")
        print(f"bias {bias:g}: z = {points[-1][1]:.1f} in 2,000 tokens")
    axes.set(xlabel="tokens", ylabel="z")
    save_picture(axes, "lab8")


# %%
if __name__ == "__main__":
    main()

# %% [markdown]
# The same with real students: `python -m experiment.blind make RUN RUN --out blind` seals a set,
# and
# `python -m experiment.blind score blind` opens it after your verdicts. `docs/api.md` has the rest.
#
# **Deliverable.** Your functions and predictions; your verdicts, if you made a set; and one
# paragraph for a judge: what does a small p show, what does it not show, and how could a careful
# copier have avoided it?
