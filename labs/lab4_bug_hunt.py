# %% [markdown]
# # Lab 4: Bug hunt
#
# Distillation code rarely crashes when it is wrong: it trains, and the student gets a little better
# anyway. Each broken loss in this lab was found in public code. You write the test that tells a
# broken distiller from a right one; then it meets four bugs that you have not seen.
#
# About 60 minutes of yours, 5 seconds of CPU. Score: bugs caught, less false alarms on right ones.

# %%
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

# (student_logits [N, C], teacher_logits [N, C], temperature) -> a scalar, in nats
Loss = Callable[[Tensor, Tensor, float], Tensor]

# %%
PREDICTIONS = {
    # solution
    "4.1": "c",
    # stub "4.1": "?",
    # end
}

# %% [markdown]
# Two right ones, and four that are broken. What is wrong with each? All claim to be
# $T^2 \cdot \mathrm{KL}(\text{teacher} \| \text{student})$, averaged over the $N$ examples, without
# a gradient for the teacher.


# %%
def right(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    p = F.log_softmax(teacher.detach() / temperature, dim=-1)
    q = F.log_softmax(student / temperature, dim=-1)
    return temperature**2 * (p.exp() * (p - q)).sum(-1).mean()


def right_with_torch(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    p = F.softmax(teacher.detach() / temperature, dim=-1)
    q = F.log_softmax(student / temperature, dim=-1)
    return temperature**2 * F.kl_div(q, p, reduction="batchmean")


def first(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    p = F.softmax(teacher.detach() / temperature, dim=-1)
    q = F.log_softmax(student / temperature, dim=-1)
    return temperature**2 * F.kl_div(q, p, reduction="none").mean()


def second(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    p = F.softmax(teacher.detach() / temperature, dim=-1)
    q = F.log_softmax(student / temperature, dim=-1)
    return F.kl_div(q, p, reduction="batchmean")


def third(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    p = F.softmax(teacher.detach() / temperature, dim=-1)
    q = F.log_softmax(student / temperature, dim=-1)
    return -(temperature**2) * (p * q).sum(-1).mean()


def fourth(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    p = F.log_softmax(teacher.detach() / temperature, dim=-1)
    q = F.softmax(student / temperature, dim=-1)
    return temperature**2 * F.kl_div(p, q, reduction="batchmean")


# %% [markdown]
# ## Exercise 4.1: the test
#
# Hard · 45 minutes · 2 seconds of CPU
#
# **Goal.** A function that calls a distiller on inputs of your choice, and says whether it is
# broken.
#
# **Formula.** Properties that hold for every right one: 0 where both are equal; a value that you
# can compute by hand; unchanged when the batch is repeated, or when a constant is added to all
# logits; a gradient of about the same size at $T = 4$ and $T = 16$; none for the teacher.
#
# **Predict first.** Which test finds most of the four above? (a) 0 where both are equal, (b) no
# gradient for the teacher, (c) a value computed by hand.
#
# **Check.** `python -m pytest labs/checks/lab4 --mine`
#
# <details><summary>Hint 1</summary>Compare with your own loss from lab 1, at T = 1 and at T = 4.
# </details>
# <details><summary>Hint 2</summary>A value can be right while the gradient is not: check both.
# </details>
# <details><summary>Hint 3</summary>Give the teacher's logits <code>requires_grad_()</code>, and
# look whether something arrives there.</details>


# %% exercise 4.1
def is_broken(loss: Loss) -> bool:
    """Whether a distiller is broken."""
    # solution
    generator = torch.Generator().manual_seed(0)
    student, teacher = 3 * torch.randn(2, 5, 7, generator=generator)
    for temperature in (1.0, 4.0):
        values, gradients = [], []
        for distiller in (right, loss):
            s, t = student.clone().requires_grad_(), teacher.clone().requires_grad_()
            value = distiller(s, t, temperature)
            value.sum().backward()
            if t.grad is not None and bool(t.grad.any()):
                return True
            values.append(value.detach())
            gradients.append(torch.zeros_like(s) if s.grad is None else s.grad)
        for expected, found in (values, gradients):
            if expected.shape != found.shape or not torch.allclose(expected, found, atol=1e-5):
                return True
    return False
    # end


# %% [markdown]
# The checks hand your function distillers as source code, through this function. Leave it as it is.


# %%
def verdict_on(source: str) -> bool:
    space = {"torch": torch, "F": F}
    exec(source, space)
    return bool(is_broken(space["loss"]))


# %%
if __name__ == "__main__":
    for name in ("right", "right_with_torch", "first", "second", "third", "fourth"):
        print(f"{name:<18} {'broken' if is_broken(globals()[name]) else 'right'}")

# %% [markdown]
# **Deliverable.** Your test, your prediction, and for each of the four broken ones a sentence: what
# is wrong, and by which number you noticed.
