# %% [markdown]
# # Lab 9: Reproduce and audit
#
# A result that nobody can repeat is a rumour, and one that repeats can still be wrong. You train
# the same thing twice, say how well it was reproduced, and then audit a report with three planted
# faults: a stale number, a test set that leaked, a baseline that was not tuned.
#
# Start both trainings before you read on: `python train.py configs/tiny.yaml`, and the same with
# `--fresh name=again`; evaluate each (`python eval.py runs/tiny`). Then
# `python eval.py --compare runs/tiny runs/again` says what differs.
#
# About 45 minutes of yours, 2 minutes of CPU.

# %%
import re

# %%
PREDICTIONS = {
    # solution
    "9.1": "b",
    "9.2": "c",
    "9.3": "a",
    "9.4": "c",
    # stub "9.1": "?",
    # stub "9.2": "?",
    # stub "9.3": "?",
    # stub "9.4": "?",
    # end
}

# %% [markdown]
# ## Exercise 9.1: how well was it reproduced?
#
# Easy · 10 minutes · no CPU
#
# **Goal.** The tier of a rerun, as `docs/reproducing.md` explains it.
#
# **Formula.** A: all hashes are equal. C: each metric lies within its band. D: one lies outside.
# `?`: there are no bands to tell. (B needs a training in float64, and is left out here.)
#
# **Predict first.** The same code on another processor most likely reaches (a) A, (b) C, (c) D.
#
# **Check.** `python -m pytest labs/checks/lab9 --mine -k tier`
#
# <details><summary>Hint 1</summary>Equal hashes need no bands.</details>
# <details><summary>Hint 2</summary>A band is (low, high), both included.</details>
# <details><summary>Hint 3</summary><code>all(...)</code> over the recorded bands.</details>


# %% exercise 9.1
def tier(
    hashes: dict[str, str],
    recorded: dict[str, str],
    metrics: dict[str, float],
    bands: dict[str, tuple[float, float]] | None,
) -> str:
    """`A`, `C`, `D` or `?`; hashes of each model, here and recorded, then each metric and its band
    (low, high)."""
    # solution
    if hashes == recorded:
        return "A"
    if not bands:
        return "?"
    inside = all(low <= metrics[name] <= high for name, (low, high) in bands.items())
    return "C" if inside else "D"
    # end


# %% [markdown]
# ## Exercise 9.2: the stale number
#
# Medium · 10 minutes · no CPU
#
# **Goal.** The models whose number in a report is not that of the result.
#
# **Formula.** A line of the report reads `- NAME: 51.3 % word errors`. The result holds a share,
# such as 0.51284. The number is right if it is the share in percent, rounded to the digits shown.
#
# **Predict first.** The best way to keep numbers in a report right is (a) two people who check, (b)
# a date beside each, (c) a command that writes them and a test that compares.
#
# **Check.** `python -m pytest labs/checks/lab9 --mine -k stale`
#
# <details><summary>Hint 1</summary><code>re.findall(r"- (\w+): ([\d.]+) %",
# report)</code></details>
# <details><summary>Hint 2</summary>How many digits stand after the point of the text?</details>
# <details><summary>Hint 3</summary><code>f"{100 * share:.{digits}f}"</code></details>


# %% exercise 9.2
def stale(report: str, result: dict[str, float]) -> list[str]:
    """The names, in the order of the report; one that the result does not have is stale, too."""
    # solution
    found = []
    for name, text in re.findall(r"- (\w+): ([\d.]+) %", report):
        digits = len(text.partition(".")[2])
        if name not in result or f"{100 * result[name]:.{digits}f}" != text:
            found.append(name)
    return found
    # end


# %% [markdown]
# ## Exercise 9.3: the leaked test set
#
# Medium · 15 minutes · 1 second of CPU
#
# **Goal.** The test texts that share a long run of words with a training text.
#
# **Formula.** A test text has leaked if any 13 words of it in a row stand in a row in a training
# text, whatever their case and punctuation (Brown et al. 2020, arXiv 2005.14165, appendix C).
# A shorter test text has leaked if all of it does.
#
# **Predict first.** Duplicates between training and test make the reported quality (a) better than
# it is, (b) worse than it is, (c) more certain.
#
# **Check.** `python -m pytest labs/checks/lab9 --mine -k leaked`
#
# <details><summary>Hint 1</summary><code>re.findall(r"\w+", text.lower())</code></details>
# <details><summary>Hint 2</summary>Go through all runs of 13 words of the test text; a shorter text
# is one run.</details>
# <details><summary>Hint 3</summary>Join words with spaces, and put a space around both: then a run
# is found with <code>in</code>, and no word is found within another.</details>


# %% exercise 9.3
def leaked(training: list[str], test: list[str], words: int = 13) -> list[int]:
    """The places, from 0, of the test texts that have leaked."""

    # solution
    def words_of(text: str) -> list[str]:
        return re.findall(r"\w+", text.lower())

    known = [f" {' '.join(words_of(text))} " for text in training]
    found = []
    for place, text in enumerate(test):
        mine = words_of(text)
        starts = range(max(1, len(mine) - words + 1))
        runs = [f" {' '.join(mine[start : start + words])} " for start in starts]
        if any(run in text for run in runs for text in known):
            found.append(place)
    return found
    # end


# %% [markdown]
# ## Exercise 9.4: the baseline that was not tuned
#
# Easy · 10 minutes · no CPU
#
# **Goal.** The methods that were tuned with fewer tries than another, or that use a rate which is
# not the best of their own tries.
#
# **Predict first.** A new method was tuned with 20 tries, the baseline runs at the rate of its
# paper. The comparison (a) is fair, (b) favours the baseline, (c) favours the new method.
#
# **Check.** `python -m pytest labs/checks/lab9 --mine -k untuned`
#
# <details><summary>Hint 1</summary>The most tries of any method are what all others need.</details>
# <details><summary>Hint 2</summary><code>min(found, key=lambda pair: pair[1])</code> is the best
# of a method's tries.</details>
# <details><summary>Hint 3</summary>Fewer tries are a fault even if the best one is used.</details>


# %% exercise 9.4
def untuned(tries: dict[str, list[tuple[float, float]]], used: dict[str, float]) -> list[str]:
    """The names, sorted. tries: {method: (learning rate, errors on the validation split) of each};
    used: the rate that each method was judged with."""
    # solution
    most = max(map(len, tries.values()))
    return sorted(
        name
        for name, found in tries.items()
        if len(found) < most or used[name] != min(found, key=lambda pair: pair[1])[0]
    )
    # end


# %%
REPORT = """
- text: 56.1 % word errors
- hidden: 51.9 % word errors
- baseline: 54.3 % word errors
"""


def main() -> None:
    print("stale:", stale(REPORT, {"text": 0.5609, "hidden": 0.5130, "baseline": 0.5427}))
    tries = {"hidden": [(0.003, 0.53), (0.006, 0.51)], "baseline": [(0.003, 0.54)]}
    print("untuned:", untuned(tries, {"hidden": 0.006, "baseline": 0.003}))
    sentence = "and it came to pass in those days that there went out a decree from the ruler"
    print("leaked:", leaked([f"First, {sentence}."], ["Something else", sentence.title()]))


# %%
if __name__ == "__main__":
    main()

# %% [markdown]
# **Deliverable.** Your functions and predictions; the tier of your two runs and what differs, in
# one sentence; and a fault of your own choice that none of these functions would find.
