# %% [markdown]
# # Lab 5: On-policy and the direction of KL
#
# A student model that is too small to imitate its teacher must choose what to give up. The
# direction of the divergence decides: forward KL covers everything the teacher might say, reverse
# KL says only what the teacher would. On-policy distillation (Agarwal et al. 2023, arXiv
# 2306.13649; Gu et al. 2023, arXiv 2306.08543) uses the student's own text, where one line of code
# is easily wrong.
#
# About 60 minutes of yours, 20 seconds of CPU.

# %%
import torch
from torch import Tensor
from torch.nn import functional as F

from labs.results import new_picture, save_picture

# %%
PREDICTIONS = {
    # solution
    "5.1": "b",
    "5.2": "a",
    "5.3": "c",
    # stub "5.1": "?",
    # stub "5.2": "?",
    # stub "5.3": "?",
    # end
}

# %% [markdown]
# ## Exercise 5.1: both directions
#
# Easy · 10 minutes · no CPU
#
# **Goal.** Forward and reverse KL of categorical distributions.
#
# **Formula.** $\mathrm{KL}(p \| q) = \sum_i p_i (\log p_i - \log q_i)$: forward with the teacher as
# $p$, reverse with the student as $p$.
#
# **Predict first.** Where the teacher has probability 0 and the student has not, (a) forward KL is
# infinite, (b) reverse KL is infinite, (c) both are.
#
# **Check.** `python -m pytest labs/checks/lab5 --mine -k directions`
#
# <details><summary>Hint 1</summary>One function serves both: swap its arguments.</details>
# <details><summary>Hint 2</summary>Work with log-probabilities; a product 0 · log 0 is
# 0.</details>
# <details><summary>Hint 3</summary><code>p.exp() * (p - q)</code>, summed over the last
# dimension.</details>


# %% exercise 5.1
def forward_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(teacher || student), [..., C] -> [...] nats."""
    # solution
    p, q = F.log_softmax(teacher_logits, -1), F.log_softmax(student_logits, -1)
    return (p.exp() * (p - q)).sum(-1)
    # end


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(student || teacher), [..., C] -> [...] nats."""
    # solution
    return forward_kl(teacher_logits, student_logits)
    # end


# %% [markdown]
# ## Exercise 5.2: two modes, one bump
#
# Medium · 20 minutes · 5 seconds of CPU
#
# The teacher is a distribution over points on a line, with two bumps. The student can make one: its
# logits are $-\frac12 ((x - m) / s)^2$ with a mean $m$ and a width $s$ to learn.
#
# **Goal.** Fit the bump in either direction, by gradient descent on $m$ and $\log s$.
#
# **Predict first.** With forward KL the bump ends (a) over both, wide, (b) over the larger one,
# narrow, (c) between them, narrow.
#
# **Expected picture.** `python mine/lab5.py` draws the teacher and both students: one covers, one
# seeks a mode.
#
# **Check.** `python -m pytest labs/checks/lab5 --mine -k bump`
#
# <details><summary>Hint 1</summary>Two numbers that need a gradient, and Adam with a learning rate
# of 0.05.</details>
# <details><summary>Hint 2</summary>Optimise the logarithm of the width: it stays
# positive.</details>
# <details><summary>Hint 3</summary>500 steps are enough.</details>


# %% exercise 5.2
def fit_bump(
    teacher_logits: Tensor, points: Tensor, reverse: bool, mean: float
) -> tuple[float, float]:
    """(mean, width) of the fitted bump, from the teacher's logits [C] at points [C], starting at
    this mean with a width of 1."""
    # solution
    m = torch.tensor(mean, requires_grad=True)
    log_width = torch.tensor(0.0, requires_grad=True)
    optimizer = torch.optim.Adam([m, log_width], lr=0.05)
    direction = reverse_kl if reverse else forward_kl
    for _ in range(500):
        student = -0.5 * ((points - m) / log_width.exp()) ** 2
        loss = direction(student, teacher_logits)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return m.item(), log_width.exp().item()
    # end


# %% [markdown]
# ## Exercise 5.3: the gradient of a sample
#
# Hard · 25 minutes · 10 seconds of CPU
#
# A language model cannot sum over all texts, so it draws some from the student and averages
# $\log q(x) - \log p(x)$. The average is right; the gradient of this average is not: its
# expectation is 0, whatever the teacher is, because the sample itself depends on the student.
#
# **Goal.** A scalar whose gradient by the student's logits is, on average over samples, that of the
# reverse KL.
#
# **Formula.** $\nabla \mathrm{KL}(q \| p) = \mathbb{E}_{x \sim q}[(\log q(x) - \log p(x))
# \nabla \log q(x)]$ (policy gradient).
#
# **Predict first.** A student trained on the plain average (a) learns slowly, (b) learns the
# forward KL, (c) does not learn from the teacher at all.
#
# **Check.** `python -m pytest labs/checks/lab5 --mine -k sample`
#
# <details><summary>Hint 1</summary>The factor in front of the gradient is a number, not something
# to differentiate.</details>
# <details><summary>Hint 2</summary><code>.detach()</code> on the difference.</details>
# <details><summary>Hint 3</summary><code>((log_q - log_p).detach() * log_q).mean()</code>
# </details>


# %% exercise 5.3
def sampled_objective(student_logits: Tensor, teacher_logits: Tensor, samples: Tensor) -> Tensor:
    """A scalar to minimise, from logits [C] of both and samples [N] drawn from the student."""
    # solution
    log_q = F.log_softmax(student_logits, -1)[samples]
    log_p = F.log_softmax(teacher_logits, -1)[samples]
    return ((log_q - log_p).detach() * log_q).mean()
    # end


# %%
def main() -> None:
    points = torch.linspace(-6, 6, 121)
    bumps = [torch.exp(-0.5 * ((points - place) / 0.6) ** 2) for place in (-2.5, 2.5)]
    teacher = (0.6 * bumps[0] + 0.4 * bumps[1]).log()
    axes = new_picture()
    axes.fill_between(points, teacher.softmax(-1), alpha=0.3, label="teacher")
    for name, reverse in (("forward", False), ("reverse", True)):
        mean, width = fit_bump(teacher, points, reverse, mean=-0.5)
        student = -0.5 * ((points - mean) / width) ** 2
        axes.plot(points, student.softmax(-1), label=f"student, {name} KL")
        print(f"{name} KL: mean {mean:+.2f}, width {width:.2f}")
    save_picture(axes, "lab5")


# %%
if __name__ == "__main__":
    main()

# %% [markdown]
# **Deliverable.** Your functions and predictions, the picture, and two sentences: which direction
# would you choose for a dictionary, and which for a chat model?
