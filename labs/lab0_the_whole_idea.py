# %% [markdown]
# # Lab 0: The whole idea in one file
#
# `labs/distill.py` is knowledge distillation in 150 lines: a teacher learns to pronounce English
# words, a student model learns from what the teacher says, and a baseline of the same size from the
# dictionary. Run it (`python labs/distill.py`, a minute), then read it from `main` upwards.
#
# In this lab you measure its models, change two of its lines, predict what happens, and look.
#
# About 30 minutes of yours, 4 minutes of CPU.

# %%
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from labs import distill
from models.rows import Batch

# %%
PREDICTIONS = {
    # solution
    "0.1": "a",
    "0.2": "b",
    "0.3": "b",
    # stub "0.1": "?",
    # stub "0.2": "?",
    # stub "0.3": "?",
    # end
}

# %% [markdown]
# ## Exercise 0.1: how small is the student model?
#
# Easy · 10 minutes · no CPU
#
# **Goal.** How many parameters a model of `distill.py` has.
#
# **Formula.** The sum over all its tensors of their number of elements.
#
# **Predict first.** The student model has 2 layers of width 56, the teacher 3 of width 96. The
# student model has (a) about a quarter of the teacher's parameters, (b) about 40 %, (c) about 60 %.
#
# **Check.** `python -m pytest labs/checks/lab0 --mine -k parameters`
#
# <details><summary>Hint 1</summary>Most parameters are matrices, whose size grows with the square
# of the width.</details>
# <details><summary>Hint 2</summary><code>model.parameters()</code></details>
# <details><summary>Hint 3</summary><code>sum(p.numel() for p in
# model.parameters())</code></details>


# %% exercise 0.1
def parameters(width: int, layers: int) -> int:
    """Of a model of this size, for the task of `distill.py`."""
    # solution
    model = distill.new_model(distill.Pronounce(limit=200), width, layers, seed=0)
    return sum(p.numel() for p in model.parameters())
    # end


# %% [markdown]
# ## Exercise 0.2: the words the teacher answers
#
# Easy · 10 minutes · 1 minute of CPU
#
# **Goal.** The places of the words whose outputs the student model learns from: every `n`-th one.
#
# **Predict first.** With a tenth of these words, and as many steps as before, the student model (a)
# does not change, (b) makes more errors, (c) makes fewer.
#
# **Check.** `python -m pytest labs/checks/lab0 --mine -k words`
#
# <details><summary>Hint 1</summary>See how <code>main</code> takes its transfer words.</details>
# <details><summary>Hint 2</summary><code>np.arange</code> has a step.</details>
# <details><summary>Hint 3</summary><code>np.arange(0, count, n)</code></details>


# %% exercise 0.2
def transfer_words(count: int, n: int) -> list[int]:
    """Of `count` words, every n-th, from the first."""
    # solution
    return np.arange(0, count, n).tolist()
    # end


# %% [markdown]
# ## Exercise 0.3: two teachers in one loss
#
# Medium · 10 minutes · 1 minute of CPU
#
# **Goal.** A loss that takes a share from the teacher's distribution, and the rest from the
# dictionary.
#
# **Formula.** $\lambda \, T^2 \, \mathrm{KL}(p^T \| q^T) + (1 - \lambda) \, \mathrm{CE}$, both
# means over the positions, as in `soft_loss` and `hard_loss`.
#
# **Predict first.** In some code $\lambda$ weighs the dictionary's term. You set it to 0.9 there,
# thinking that it weighs the teacher's. The student model ends closest to (a) the one you wanted,
# (b) the baseline, (c) the teacher.
#
# **Check.** `python -m pytest labs/checks/lab0 --mine -k mixed`
#
# <details><summary>Hint 1</summary><code>distill.soft_loss</code> fits as it is;
# <code>hard_loss</code> takes a batch, so use <code>F.cross_entropy</code>.</details>
# <details><summary>Hint 2</summary>Which of the two terms does the share belong to?</details>
# <details><summary>Hint 3</summary><code>share * soft + (1 - share) * hard</code></details>


# %% exercise 0.3
def mixed_loss(
    logits: Tensor, targets: Tensor, teacher_log_probs: Tensor, temperature: float, share: float
) -> Tensor:
    """A scalar, from logits [M, V], phonemes [M] and the teacher's log-probabilities [M, V]."""
    # solution
    soft = distill.soft_loss(logits, teacher_log_probs, temperature)
    return share * soft + (1 - share) * F.cross_entropy(logits, targets)
    # end


# %%
def main() -> None:
    """`distill.py` with three changed lines."""
    task = distill.Pronounce()
    rows, test = task.rows("train"), task.rows("heldout").take(np.arange(0, 6000, 12))
    teacher = distill.new_model(task, width=96, layers=3, seed=0)
    distill.train(teacher, rows, distill.hard_loss, distill.TEACHER_STEPS, learning_rate=0.003)
    for n, temperature, share in ((8, 1.0, 1.0), (80, 1.0, 1.0), (8, 4.0, 1.0), (8, 1.0, 0.5)):
        transfer = rows.take(np.array(transfer_words(len(rows), n)))
        outputs = distill.outputs_of(teacher, transfer)

        def loss(logits: Tensor, batch: Batch) -> Tensor:
            revealed = torch.cat([outputs[i] for i in batch.indices]).float()  # noqa: B023
            return mixed_loss(logits, batch.targets, revealed, temperature, share)  # noqa: B023

        student = distill.new_model(task, width=56, layers=2, seed=1)
        distill.train(student, transfer, loss, distill.STUDENT_STEPS, learning_rate=0.006)
        answers = distill.answers_of(student, task, test)
        wrong = task.grade(test.ids, answers)["wrong"].mean()
        print(f"every {n}th word, T = {temperature:g}, share {share:g}: {wrong:.1%} word errors")


# %%
if __name__ == "__main__":
    main()

# %% [markdown]
# One run of each says what happened, not what happens: lab 3 is about that.
#
# **Deliverable.** Your functions and predictions; the four numbers; and the change that surprised
# you most, in one sentence.
