# %% [markdown]
# # Lab 6: Reasoning traces and thinking longer
#
# A teacher that reasons writes its steps before its answer. Are the steps right, do they lead to
# the answer, and does a student learn more from them than from answers alone? And what does a
# longer thought, or a vote among several, buy after training (Wei et al. 2022, arXiv 2201.11903;
# Wang et al. 2022, arXiv 2203.11171)?
#
# The problems are chains of additions and subtractions:
#
# `A box holds 7 pens. 5 more go in. 3 are taken out. How many are in the box?`
# `<think> 7+5=12;12-3=9 </think> 9`
#
# About 75 minutes of yours, 10 seconds of CPU; with a run of your own, 10 minutes more.

# %%
import re
from collections import Counter
from math import comb

from labs.results import committed_result, new_picture, save_picture

# %%
PREDICTIONS = {
    # solution
    "6.1": "b",
    "6.2": "b",
    "6.3": "a",
    "6.4": "c",
    # stub "6.1": "?",
    # stub "6.2": "?",
    # stub "6.3": "?",
    # stub "6.4": "?",
    # end
}

# %% [markdown]
# ## Exercise 6.1: read a trace
#
# Medium · 20 minutes · no CPU
#
# **Goal.** The steps and the answer of what a model wrote; whatever it wrote, without an error.
#
# **Formula.** A step is `before+operand=after` or `before-operand=after`, with whole numbers; the
# operand of the second is negative. Steps are separated by `;`, and stand between `<think>` and
# `</think>`, or up to the end if that is missing. What stands after it is the answer.
#
# **Predict first.** A trace in which every step is right arithmetic (a) has the right answer, (b)
# may be about another question, (c) was written by the teacher.
#
# **Check.** `python -m pytest labs/checks/lab6 --mine -k read`
#
# <details><summary>Hint 1</summary><code>text.partition("&lt;/think&gt;")</code> gives both parts,
# and says whether the mark was there.</details>
# <details><summary>Hint 2</summary><code>re.fullmatch(r"(\d+)([+-]\d+)=(\d+)", step)</code>
# </details>
# <details><summary>Hint 3</summary>Spaces mean nothing: remove them first. A step that cannot be
# read is <code>None</code>, and so is an answer that is no number.</details>


# %% exercise 6.1
def read_trace(text: str) -> tuple[list[list[int] | None], int | None]:
    """([before, operand, after] of each step, the answer). A text without `</think>` has no answer.
    A thought without any text has no steps."""
    # solution
    thought, marked, answer = text.replace(" ", "").partition("</think>")
    thought = thought.removeprefix("<think>")
    found = [re.fullmatch(r"(\d+)([+-]\d+)=(\d+)", step) for step in thought.split(";")]
    steps = [[int(part) for part in match.groups()] if match else None for match in found]
    number = int(answer) if marked and answer.isdecimal() else None
    return (steps if thought else []), number
    # end


# %% [markdown]
# ## Exercise 6.2: where does it go wrong?
#
# Medium · 15 minutes · no CPU
#
# **Goal.** The first step that is wrong, missing or extra.
#
# **Predict first.** A step is right only if it is the expected one in its place. If step 2 of 4
# copies a wrong number, and all later arithmetic is right, then (a) one step is wrong, (b) steps 2
# to 4 are wrong, (c) only the answer is wrong.
#
# **Check.** `python -m pytest labs/checks/lab6 --mine -k wrong`
#
# <details><summary>Hint 1</summary>Compare both lists place by place.</details>
# <details><summary>Hint 2</summary>If one list is longer, the first place that only one of them has
# is where it goes wrong.</details>
# <details><summary>Hint 3</summary><code>itertools.zip_longest</code>, with a
# <code>fillvalue</code> that is no step; <code>None</code> can be one.</details>


# %% exercise 6.2
def first_wrong_step(stated: list[list[int] | None], expected: list[list[int]]) -> int | None:
    """Counted from 1; None if all are right."""
    # solution
    for place in range(max(len(stated), len(expected))):
        if stated[place : place + 1] != expected[place : place + 1]:
            return place + 1
    return None
    # end


# %% [markdown]
# ## Exercise 6.3: learn from right traces only
#
# Easy · 10 minutes · no CPU
#
# A teacher that is sampled at temperature 1 is sometimes wrong. Rejection sampling (Zelikman et al.
# 2022, arXiv 2203.14465) keeps the traces whose answer is right.
#
# **Goal.** The places of the traces that are kept.
#
# **Predict first.** If the sampled teacher is right in 99 of 100 traces, keeping only these (a)
# changes little, (b) halves the student's errors, (c) makes the student better than its teacher.
#
# **Check.** `python -m pytest labs/checks/lab6 --mine -k right`
#
# <details><summary>Hint 1</summary>Use <code>read_trace</code>.</details>
# <details><summary>Hint 2</summary>A trace without an answer is not right.</details>
# <details><summary>Hint 3</summary>Do not remove duplicates, and do not look at the
# steps.</details>


# %% exercise 6.3
def right_traces(traces: list[str], answers: list[int]) -> list[int]:
    """The places, from 0, of the traces that end with the right answer."""
    # solution
    return [
        place
        for place, (trace, answer) in enumerate(zip(traces, answers, strict=True))
        if read_trace(trace)[1] == answer
    ]
    # end


# %% [markdown]
# ## Exercise 6.4: vote
#
# Medium · 20 minutes · no CPU
#
# **Goal.** The answer of several samples, and how often a vote is right.
#
# **Formula.** If each of $n$ votes (odd) is right with probability $p$, independently, and all
# wrong ones agree on the same number, then the vote is right with probability
# $\sum_{k > n/2} \binom{n}{k} p^k (1-p)^{n-k}$.
#
# **Predict first.** In truth wrong answers scatter over many numbers. A model that is right in 40 %
# of its samples of every question (a) loses by voting, (b) neither gains nor loses, (c) gains.
#
# **Check.** `python -m pytest labs/checks/lab6 --mine -k vote`
#
# <details><summary>Hint 1</summary>Samples without an answer do not vote.</details>
# <details><summary>Hint 2</summary><code>collections.Counter</code> keeps the order in which values
# came first.</details>
# <details><summary>Hint 3</summary><code>math.comb(n, k)</code></details>


# %% exercise 6.4
def vote(answers: list[int | None]) -> int | None:
    """The most frequent answer; of several, the one that came first. None if there is no vote."""
    # solution
    counted = Counter(answer for answer in answers if answer is not None)
    return counted.most_common(1)[0][0] if counted else None
    # end


def chance_of_majority(p: float, n: int) -> float:
    """That more than half of n votes are right, n odd."""
    # solution
    return sum(comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n // 2 + 1, n + 1))
    # end


# %% [markdown]
# ## Read a run
#
# `results/reason.json` holds students that learned from traces and from answers alone, at equal
# FLOPs, of problems with up to 5 steps. What do both learn? What does a vote add? And what is left
# of the student of traces if its thought is cut to a number of tokens, so that it must answer?


# %%
def main() -> None:
    students, steps = committed_result("reason")["students"], range(1, 6)
    axes = new_picture()
    for name in ("traces", "answers"):
        quality = students[name]["quality"]
        shares = [100 * quality[f"accuracy_{n}"]["mean"] for n in steps]
        axes.plot(steps, shares, marker="o", label=name)
        print(f"{name}, 1 to 5 steps: " + ", ".join(f"{share:.0f} %" for share in shares))
    axes.set(xlabel="steps of the problem", ylabel="right answers %", ylim=(-3, 103), xticks=steps)
    save_picture(axes, "lab6")
    for name in ("traces", "answers"):
        for kind, what in (("voting", "votes"), ("thinking", "tokens of thought")):
            points = students[name]["reasoning"][kind] or []
            shown = ", ".join(f"{point['amount']}: {point['accuracy']:.0%}" for point in points)
            print(f"{name}, right by {what}: {shown or 'it has none'}")


# %%
if __name__ == "__main__":
    main()

# %% [markdown]
# To train a small run of your own: `python train.py configs/reason-small.yaml`, then
# `python eval.py runs/reason-small`; its report shows at which step each student goes wrong first.
#
# **Deliverable.** Your functions and predictions; and the answer to one question, with the number
# that supports it: does a trace explain how a student found its answer?
