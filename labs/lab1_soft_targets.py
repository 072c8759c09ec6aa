# %% [markdown]
# # Lab 1: Soft targets and temperature
#
# A teacher that has learned to read digits knows more than which digit it sees: it knows that this
# 7 could almost be a 1. In this lab you make that knowledge visible, and write the loss that passes
# it on to a student model (Hinton, Vinyals and Dean 2015, arXiv 1503.02531).
#
# You need PyTorch alone. About 45 minutes of yours, 10 seconds of CPU.

# %%
import torch
from torch import Tensor
from torch.nn import functional as F

from labs.digits import Digits, load_digits, new_network, train_teacher
from labs.results import new_picture, save_picture

# %% [markdown]
# Before each exercise you predict something. Write your choice here, before you run the code; a
# wrong prediction teaches more than none.

# %%
PREDICTIONS = {
    # solution
    "1.1": "b",
    "1.2": "c",
    "1.3": "a",
    # stub "1.1": "?",
    # stub "1.2": "?",
    # stub "1.3": "?",
    # end
}

# %% [markdown]
# ## Exercise 1.1: soften a distribution
#
# Easy · 5 minutes · no CPU
#
# **Goal.** The probabilities of a teacher at a temperature.
#
# **Formula.** $p_i = \exp(z_i / T) / \sum_j \exp(z_j / T)$ with logits $z$.
#
# **Predict first.** As $T$ grows, the distribution approaches (a) the one with all probability on
# the largest logit, (b) the uniform one, (c) the one at $T = 1$.
#
# **Check.** `pytest labs/checks/lab1 --mine -k soften`
#
# <details><summary>Hint 1</summary>What happens to the differences between logits when all are
# divided by a large number?</details>
# <details><summary>Hint 2</summary>The temperature comes before the softmax, not after it.
# </details>
# <details><summary>Hint 3</summary><code>torch.softmax(..., dim=-1)</code></details>


# %% exercise 1.1
def soften(logits: Tensor, temperature: float) -> Tensor:
    """Probabilities [..., C] of logits [..., C] at a temperature."""
    # solution
    return torch.softmax(logits / temperature, dim=-1)
    # end


# %% [markdown]
# ## Exercise 1.2: the distillation loss
#
# Medium · 15 minutes · no CPU
#
# **Goal.** How far the student is from the teacher, as one number whose gradient teaches.
#
# **Formula.** $T^2 \cdot \frac{1}{N} \sum_n \mathrm{KL}(p_n \| q_n)$ with $p$ of the teacher and
# $q$ of the student, both at temperature $T$, over the $N$ examples of the batch. No gradient
# reaches the teacher.
#
# **Predict first.** Without the factor $T^2$, the gradient at $T = 8$ is about (a) as large as at
# $T = 1$, (b) 8 times smaller, (c) 64 times smaller.
#
# **Check.** `pytest labs/checks/lab1 --mine -k loss`
#
# <details><summary>Hint 1</summary>KL(p || q) is 0 where the student equals the teacher. Is yours?
# </details>
# <details><summary>Hint 2</summary><code>F.kl_div</code> takes log-probabilities of the student
# first; its default reduction divides by the number of classes, too.</details>
# <details><summary>Hint 3</summary>Write the sum over classes yourself, then take the mean over
# examples.</details>


# %% exercise 1.2
def distillation_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """A scalar, in nats per example, from logits [N, C] of both."""
    # solution
    teacher = F.log_softmax(teacher_logits.detach() / temperature, dim=-1)
    student = F.log_softmax(student_logits / temperature, dim=-1)
    return temperature**2 * (teacher.exp() * (teacher - student)).sum(-1).mean()
    # end


# %% [markdown]
# ## Exercise 1.3: dark knowledge
#
# Easy · 10 minutes · 3 seconds of CPU
#
# **Goal.** For each digit, the digit that the teacher most often takes it for in second place.
#
# **Predict first.** For images of a 4, that is (a) 9, (b) 7, (c) 1.
#
# **Expected picture.** `python mine/lab1.py` prints ten digits with their doubles, and draws what
# the teacher thinks of a 7 at three temperatures.
#
# **Check.** `pytest labs/checks/lab1 --mine -k double`
#
# <details><summary>Hint 1</summary><code>topk(2)</code> gives the likeliest two.</details>
# <details><summary>Hint 2</summary>Average the probabilities of all images of a digit first, then
# leave the digit itself out.</details>
# <details><summary>Hint 3</summary>Set the entry of the digit itself to 0 before
# <code>argmax</code>.</details>


# %% exercise 1.3
def doubles(teacher_probabilities: Tensor, labels: Tensor) -> list[int]:
    """For each class c, the other class that is likeliest on average over the examples [N] with
    this label: probabilities [N, C] -> C numbers."""
    # solution
    count = teacher_probabilities.shape[1]
    found = []
    for c in range(count):
        mean = teacher_probabilities[labels == c].mean(0)
        mean[c] = 0
        found.append(int(mean.argmax()))
    return found
    # end


# %% [markdown]
# ## What the teacher knows, and passes on
#
# Run this cell. Does the student that learns from the teacher's probabilities beat the one that
# learns from the same images' labels? Both see 300 images.


# %%
def errors(network: torch.nn.Module, digits: Digits) -> float:
    with torch.no_grad():
        return float((network(digits.images).argmax(-1) != digits.labels).float().mean())


def main() -> None:
    torch.set_num_threads(1)
    train, test = load_digits()
    teacher = train_teacher(train)
    with torch.no_grad():
        logits = teacher(train.images)
    print("doubles", doubles(soften(logits, 4.0), train.labels))
    axes = new_picture()
    seven = int((train.labels == 7).nonzero()[0, 0])
    for place, temperature in enumerate((1.0, 4.0, 16.0)):
        heights = soften(logits[seven], temperature)
        axes.bar(torch.arange(10) + 0.3 * place - 0.3, heights, 0.3, label=f"T = {temperature:g}")
    axes.set(xlabel="digit", ylabel="the teacher's probability, of a 7", xticks=range(10))
    save_picture(axes, "lab1")
    few = train.first(300)
    for name in ("labels", "teacher"):
        student = new_network(width=32, seed=1)
        optimizer = torch.optim.AdamW(student.parameters(), lr=0.003)
        for _ in range(300):
            found = student(few.images)
            if name == "labels":
                loss = F.cross_entropy(found, few.labels)
            else:
                loss = distillation_loss(found, logits[:300], 4.0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"taught by the {name}: {100 * errors(student, test):.1f} % errors")


# %%
if __name__ == "__main__":
    main()

# %% [markdown]
# **Deliverable.** Your three functions, your predictions, and one sentence: which digit's double
# surprised you, and why might the teacher see it?
