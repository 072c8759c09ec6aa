# %% [markdown]
# # Lab 2: The distillation step
#
# From a teacher's outputs on disk to a student model that takes one step towards them: which
# positions count, how to average them, what a closed API reveals, and the loop. At the end your
# student overfits one batch, the first test of every training loop.
#
# About 60 minutes of yours, 10 seconds of CPU.

# %%
import torch
from torch import Tensor
from torch.nn import functional as F

# %%
PREDICTIONS = {
    # solution
    "2.1": "a",
    "2.2": "b",
    "2.3": "c",
    "2.4": "b",
    # stub "2.1": "?",
    # stub "2.2": "?",
    # stub "2.3": "?",
    # stub "2.4": "?",
    # end
}

# %% [markdown]
# ## Exercise 2.1: which positions count
#
# Medium · 15 minutes · no CPU
#
# A row holds a prompt, an answer and padding. A causal model's logits at position $i$ predict the
# token at $i + 1$. Only the answer's tokens are learned, its end mark included.
#
# **Goal.** A mask over the logits of a batch.
#
# **Formula.** Position $i$ of row $r$ counts if $P_r - 1 \le i < L_r - 1$, with $P_r$ tokens of the
# prompt and $L_r$ of prompt and answer.
#
# **Predict first.** A mask that begins one position too late never teaches (a) the first token of
# the answer, (b) the last token of the prompt, (c) the end mark.
#
# **Check.** `python -m pytest labs/checks/lab2 --mine -k counted`
#
# <details><summary>Hint 1</summary>Write down the row [P P A A E] and the token that each position
# predicts.</details>
# <details><summary>Hint 2</summary><code>torch.arange(width)</code> compared with a column of
# lengths gives a mask.</details>
# <details><summary>Hint 3</summary><code>lengths[:, None] - 1</code> is the first position after
# those that count.</details>


# %% exercise 2.1
def counted(prompt_lengths: Tensor, lengths: Tensor, width: int) -> Tensor:
    """Whether the logits at each position predict a token of the answer: bool [B, width], from the
    tokens of the prompts [B] and of the rows [B]."""
    # solution
    position = torch.arange(width)
    return (position >= prompt_lengths[:, None] - 1) & (position < lengths[:, None] - 1)
    # end


# %% [markdown]
# ## Exercise 2.2: the mean over tokens
#
# Easy · 10 minutes · no CPU
#
# **Goal.** The mean of a loss over all positions that count in a batch.
#
# **Formula.** $\sum_{r,i} m_{ri} \ell_{ri} / \sum_{r,i} m_{ri}$
#
# **Predict first.** The mean of each row's mean gives more weight to tokens of (a) long answers,
# (b) short answers, (c) neither.
#
# **Check.** `python -m pytest labs/checks/lab2 --mine -k mean`
#
# <details><summary>Hint 1</summary>One sum over everything, one count over everything.</details>
# <details><summary>Hint 2</summary>Values where the mask is false may be anything, even
# infinite.</details>
# <details><summary>Hint 3</summary><code>values[mask].mean()</code></details>


# %% exercise 2.2
def token_mean(values: Tensor, mask: Tensor) -> Tensor:
    """The mean of values [B, W] where mask [B, W] is true: a scalar."""
    # solution
    return values[mask].mean()
    # end


# %% [markdown]
# ## Exercise 2.3: what a closed API reveals
#
# Medium · 15 minutes · no CPU
#
# An API shows the k largest log-probabilities. The other tokens have the remaining probability
# together: the tail.
#
# **Goal.** The divergence that this leaves: over $k$ tokens and the tail as one more outcome.
#
# **Formula.** $\sum_{j \le k} p_j (\log p_j - \log q_j) + p_t (\log p_t - \log q_t)$ with
# $p_t = 1 - \sum_{j \le k} p_j$ and $q_t$ in the same way.
#
# **Predict first.** Without the tail, this sum (a) is the full divergence, (b) is too large,
# (c) can be negative.
#
# **Check.** `python -m pytest labs/checks/lab2 --mine -k top_k`
#
# <details><summary>Hint 1</summary>Gather the student's log-probabilities at the teacher's
# indices.</details>
# <details><summary>Hint 2</summary>Softmax over the whole vocabulary first, then pick.</details>
# <details><summary>Hint 3</summary><code>(1 - p.sum(-1)).clamp_min(1e-9)</code> keeps the logarithm
# finite.</details>


# %% exercise 2.3
def top_k_divergence(student_logits: Tensor, indices: Tensor, log_probs: Tensor) -> Tensor:
    """[M] nats, from the student's logits [M, V] and the teacher's k largest log-probabilities
    [M, k] at these indices [M, k]."""
    # solution
    student = F.log_softmax(student_logits, dim=-1).gather(-1, indices)
    tails = [(1 - x.exp().sum(-1)).clamp_min(1e-9).log() for x in (log_probs, student)]
    inside = (log_probs.exp() * (log_probs - student)).sum(-1)
    return inside + tails[0].exp() * (tails[0] - tails[1])
    # end


# %% [markdown]
# ## Exercise 2.4: the step
#
# Medium · 15 minutes · 5 seconds of CPU
#
# The student is one matrix: logits are inputs times weights.
#
# **Goal.** One step of gradient descent on the mean divergence from the teacher; then the loop.
#
# **Formula.** $W \leftarrow W - \eta \nabla_W \frac{1}{M} \sum_m \mathrm{KL}(p_m \| q_m)$
#
# **Predict first.** The loss of a student that can imitate its teacher exactly falls to (a) the
# teacher's entropy, (b) 0, (c) below 0.
#
# **Check.** `python -m pytest labs/checks/lab2 --mine -k step`
#
# <details><summary>Hint 1</summary>Make a copy of the weights that needs a gradient:
# <code>weights.clone().requires_grad_()</code>.</details>
# <details><summary>Hint 2</summary><code>torch.autograd.grad(loss, w)</code> returns a
# tuple.</details>
# <details><summary>Hint 3</summary>Return new weights without a gradient:
# <code>.detach()</code>.</details>


# %% exercise 2.4
def step(
    weights: Tensor, inputs: Tensor, teacher_logits: Tensor, learning_rate: float
) -> tuple[Tensor, Tensor]:
    """(weights [D, V] after one step, the loss before it), from inputs [M, D] and the teacher's
    logits [M, V]."""
    # solution
    w = weights.clone().requires_grad_()
    teacher = F.log_softmax(teacher_logits, dim=-1)
    student = F.log_softmax(inputs @ w, dim=-1)
    loss = (teacher.exp() * (teacher - student)).sum(-1).mean()
    (gradient,) = torch.autograd.grad(loss, w)
    return (w - learning_rate * gradient).detach(), loss.detach()
    # end


# %%
def main() -> None:
    torch.manual_seed(0)
    inputs, teacher_logits = torch.randn(16, 32), 3 * torch.randn(16, 10)
    weights = torch.zeros(32, 10)
    for number in range(401):
        weights, loss = step(weights, inputs, teacher_logits, 1.0)
        if number % 100 == 0:
            print(f"step {number:>4}  loss {float(loss):.6f}")


# %%
if __name__ == "__main__":
    main()

# %% [markdown]
# **Deliverable.** Your four functions and your predictions; and the value that the loss falls to,
# with the reason.
