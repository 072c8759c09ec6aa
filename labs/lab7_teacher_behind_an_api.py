# %% [markdown]
# # Lab 7: The teacher behind an API
#
# First you are a customer who distils a teacher through a key and a quota. Then you change sides
# and look for such customers in a usage log. `docs/the-case.md` has the news behind this lab.
#
# Be that customer first: the sections *Sell* and *Extract* of `docs/the-case.md` take ten minutes,
# most of them of your machine. No exercise needs it.
#
# About 90 minutes of yours, 5 seconds of CPU.

# %%
import math
from collections import Counter

import numpy as np

# %%
PREDICTIONS = {
    # solution
    "7.1": "c",
    "7.2": "b",
    "7.3": "b",
    "7.4": "b",
    "7.5": "c",
    # stub "7.1": "?",
    # stub "7.2": "?",
    # stub "7.3": "?",
    # stub "7.4": "?",
    # stub "7.5": "?",
    # end
}

# %% [markdown]
# ## Exercise 7.1: ask again, or give up?
#
# Easy · 15 minutes · no CPU
#
# **Goal.** How long a client waits before it repeats a request that failed.
#
# **Formula.** Statuses 408, 409, 429 and 500 or more can be tried again, others not; none if the
# header `x-should-retry` is `false`. A header `retry-after` holds the seconds to wait; without it,
# $0.5 \cdot 2^n$ seconds after $n$ earlier tries, at most 8.
#
# **Predict first.** A day's quota is used up. The request should be repeated (a) at once, (b) after
# a second, (c) not before the quota resets.
#
# **Check.** `python -m pytest labs/checks/lab7 --mine -k again`
#
# <details><summary>Hint 1</summary>Decide first whether, then how long.</details>
# <details><summary>Hint 2</summary>A server that names the seconds knows better than the
# formula.</details>
# <details><summary>Hint 3</summary><code>float(headers["retry-after"])</code></details>


# %% exercise 7.1
def seconds_to_wait(status: int, headers: dict[str, str], tries: int) -> float | None:
    """Before the next try; None to give up. tries: how many came before this one."""
    # solution
    if headers.get("x-should-retry") == "false":
        return None
    if status not in (408, 409, 429) and status < 500:
        return None
    if "retry-after" in headers:
        return float(headers["retry-after"])
    return min(8.0, 0.5 * 2**tries)
    # end


# %% [markdown]
# ## Exercise 7.2: a budget that is never exceeded
#
# Medium · 15 minutes · no CPU
#
# **Goal.** How many questions may be in flight at once, before any of them is answered.
#
# **Formula.** A question costs its prompt's tokens times `price_in`, and its answer's tokens times
# `price_out`, both per million. Until it is answered, only the most that the answer may have is
# known.
#
# **Predict first.** A client that counts a question's cost when its answer arrives, with 32 in
# flight, (a) stays within its budget, (b) can exceed it by the cost of those in flight, (c) spends
# less than it could.
#
# **Check.** `python -m pytest labs/checks/lab7 --mine -k budget`
#
# <details><summary>Hint 1</summary>Reserve for each the most that it can cost.</details>
# <details><summary>Hint 2</summary>Go through the prompts in order, and stop at the first that does
# not fit.</details>
# <details><summary>Hint 3</summary>Prices are per million tokens.</details>


# %% exercise 7.2
def within_budget(
    prompt_tokens: list[int], most_tokens: int, price_in: float, price_out: float, budget: float
) -> int:
    """How many of these prompts, in order, can be asked if every answer may have most_tokens."""
    # solution
    spent = 0.0
    for count, tokens in enumerate(prompt_tokens):
        spent += (tokens * price_in + most_tokens * price_out) / 1e6
        if spent > budget:
            return count
    return len(prompt_tokens)
    # end


# %% [markdown]
# ## Exercise 7.3: change sides: how broad is an account?
#
# Easy · 15 minutes · no CPU
#
# You are the owner now. The log says which prompts each account asked, and prompts have topics.
#
# **Goal.** How many topics an account asks about, and how evenly.
#
# **Formula.** The entropy $H = -\sum_i p_i \log p_i$ in nats, with $p_i$ the share of topic $i$
# among the account's questions.
#
# **Predict first.** Compared with somebody who chats about a few topics, an extractor that asks for
# everything has (a) a lower entropy, (b) a higher one, (c) the same.
#
# **Check.** `python -m pytest labs/checks/lab7 --mine -k entropy`
#
# <details><summary>Hint 1</summary><code>Counter(topics).values()</code></details>
# <details><summary>Hint 2</summary>Natural logarithms.</details>
# <details><summary>Hint 3</summary>A single topic has entropy 0; so has an account without
# questions.</details>


# %% exercise 7.3
def topic_entropy(topics: list[int]) -> float:
    """In nats, from the topic of every question."""
    # solution
    counts = Counter(topics).values()
    return -sum(n / len(topics) * math.log(n / len(topics)) for n in counts)
    # end


# %% [markdown]
# ## Exercise 7.4: a threshold from trusted accounts
#
# Medium · 20 minutes · no CPU
#
# **Goal.** A threshold that a new honest account exceeds with at most a given probability, whatever
# distribution the scores have, if the account is drawn like the trusted ones.
#
# **Formula.** Of $n$ scores of trusted accounts, in ascending order, take number
# $\lceil (n + 1)(1 - \alpha) \rceil$, counted from 1; if there are fewer, the threshold is infinite
# (split conformal prediction).
#
# **Predict first.** With 50 trusted accounts and 1 % of false alarms, (a) their largest score is
# the threshold, (b) no score is high enough, (c) the mean and three standard deviations are.
#
# **Check.** `python -m pytest labs/checks/lab7 --mine -k threshold`
#
# <details><summary>Hint 1</summary>A new account is as likely to be the largest of all as any of
# the trusted ones: 1 in n + 1.</details>
# <details><summary>Hint 2</summary><code>math.ceil</code>, and Python counts from 0.</details>
# <details><summary>Hint 3</summary><code>math.inf</code> where the number is larger than n.
# </details>


# %% exercise 7.4
def threshold(scores: list[float], false_alarms: float) -> float:
    """That at most this share of new honest accounts exceeds."""
    # solution
    place = math.ceil((len(scores) + 1) * (1 - false_alarms) - 1e-9)
    return sorted(scores)[place - 1] if place <= len(scores) else math.inf
    # end


# %% [markdown]
# ## Exercise 7.5: find them
#
# Hard · 25 minutes · 2 seconds of CPU
#
# A log is `{account: [[second, prompt, topic], ...]}`. Trusted accounts chat, run applications (few
# prompts, again and again), batch jobs (neighbours in order) and evaluations (a broad sample, the
# same every day). Extractors ask for everything once: fast, slowly, or divided among accounts.
#
# **Goal.** A score of an account that is high for extractors. Its threshold comes from trusted
# accounts, by your function above, at 5 % of false alarms; it should find half of the extractors, a
# good one nine of ten.
#
# **Predict first.** By the entropy of exercise 7.3 alone, the honest customers who are flagged most
# often are (a) those who chat, (b) applications, (c) evaluations.
#
# **Check.** `python -m pytest labs/checks/lab7 --mine -k find`
#
# <details><summary>Hint 1</summary>An evaluation is as broad as an extractor. What else does it do?
# </details>
# <details><summary>Hint 2</summary>The share of questions that were never asked before is 1 for an
# extractor. It is 1 for a batch job, too.</details>
# <details><summary>Hint 3</summary>Multiply both.</details>


# %% exercise 7.5
def score(asked: list[list[float]]) -> float:
    """How much an account looks like an extractor, from its [second, prompt, topic]."""
    # solution
    prompts, topics = [one[1] for one in asked], [int(one[2]) for one in asked]
    return topic_entropy(topics) * len(set(prompts)) / len(prompts)
    # end


# %%
def main() -> None:
    draw = np.random.default_rng(0)
    trusted = [
        topic_entropy(draw.integers(0, draw.integers(1, 9), 60).tolist()) for _ in range(300)
    ]
    broad = [topic_entropy(draw.integers(0, 100, n).tolist()) for n in (10, 20, 50, 100)]
    limit = threshold(trusted, 0.01)
    print(f"threshold {limit:.2f}; an extractor after 10, 20, 50 and 100 questions:")
    print(", ".join(f"{value:.2f}{' alarm' * (value > limit)}" for value in broad))


# %%
if __name__ == "__main__":
    main()

# %% [markdown]
# `python -m measure.extraction` does the same for a real log, with a detector that has seen no
# attack; `docs/the-case.md` makes such a log in a minute.
#
# **Deliverable.** Your functions and predictions; a score; and one paragraph to the owner: an
# account is above the threshold. What do you know, what do you do, what do you not do?
