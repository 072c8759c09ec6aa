"""The whole idea in one file: a teacher, its outputs, a student, a comparison. About a minute.

    python labs/distill.py

The task is to pronounce English words (`distill` is `D IH S T IH L`). The teacher learns from the
dictionary. One student learns from the teacher's probabilities, a baseline of the same size from
the dictionary itself; both see the same words in the same order, from the same starting weights.
`train.py` does the same with checkpoints, a cost ledger and more kinds of outputs and objectives.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from models.rows import Batch, Rows, batch_order, collate
from tasks.pronounce import Pronounce

BATCH_ROWS = 64
TEMPERATURE = 1.0
TEACHER_STEPS, STUDENT_STEPS = 1200, 400


def new_model(task: Pronounce, width: int, layers: int, seed: int) -> nn.Module:
    """An untrained causal language model: token ids [B, L] -> logits [B, L, V]."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=task.vocabulary,
        hidden_size=width,
        intermediate_size=8 * width // 3,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=task.longest_row,
        initializer_range=0.08,
        tie_word_embeddings=True,
        pad_token_id=task.pad,
    )
    return LlamaForCausalLM(config)


def logits_at(model: nn.Module, batch: Batch) -> Tensor:
    """The logits [M, V] that predict the M phonemes of a batch: those at the position before."""
    return model(batch.input_ids, use_cache=False).logits[batch.counted]


def hard_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy with the dictionary's phonemes: the mean over M positions, in nats."""
    return F.cross_entropy(logits, batch.targets)


def soft_loss(logits: Tensor, teacher_log_probs: Tensor, temperature: float) -> Tensor:
    """T^2 KL(teacher || student), both softened by the temperature: the mean over M positions, in
    nats. T^2 keeps the gradient at its scale (Hinton et al. 2015, arXiv 1503.02531, section 2)."""
    teacher = F.log_softmax(teacher_log_probs / temperature, dim=-1)
    student = F.log_softmax(logits / temperature, dim=-1)
    return temperature**2 * (teacher.exp() * (teacher - student)).sum(-1).mean()


def train(
    model: nn.Module,
    rows: Rows,
    loss: Callable[[Tensor, Batch], Tensor],
    steps: int,
    learning_rate: float,
) -> None:
    """The training loop: batch, forward, loss, backward, step."""
    order = batch_order(rows.lengths, BATCH_ROWS, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    for step in range(steps):
        batch = collate(rows, order(step), pad=0)
        value = loss(logits_at(model, batch), batch)
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            print(f"  step {step + 1:>5}  loss {value.item():.3f}")


@torch.no_grad()
def outputs_of(teacher: nn.Module, rows: Rows) -> list[Tensor]:
    """The teacher's log-probabilities at the phonemes of every row, [n, V] each. The student never
    sees the teacher, only these outputs."""
    found: list[Tensor] = []
    for indices in np.array_split(np.arange(len(rows)), -(-len(rows) // 512)):
        batch = collate(rows, indices, pad=0)
        log_probs = F.log_softmax(logits_at(teacher, batch), dim=-1).half()
        found += log_probs.split(batch.counted.sum(1).tolist())
    return found


@torch.no_grad()
def answers_of(model: nn.Module, task: Pronounce, rows: Rows) -> list[str]:
    """Greedy answers, in batches of words of equal length, without a cache."""
    answers = [""] * len(rows)
    for length in np.unique(rows.prompt_lengths):
        places = np.flatnonzero(rows.prompt_lengths == length)
        ids = torch.from_numpy(np.stack([rows.prompt(i) for i in places]).astype(np.int64))
        for _ in range(20):  # phonemes at most
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
        for place, row in zip(places, ids[:, length:].tolist(), strict=True):
            answers[place] = task.render(row)
    return answers


def main() -> None:
    task = Pronounce()
    rows, test = task.rows("train"), task.rows("heldout").take(np.arange(0, 6000, 12))

    print("teacher")
    teacher = new_model(task, width=96, layers=3, seed=0)
    train(teacher, rows, hard_loss, TEACHER_STEPS, learning_rate=0.003)

    transfer = rows.take(np.arange(0, len(rows), 8))  # the words the teacher answers
    outputs = outputs_of(teacher, transfer)

    def distillation(logits: Tensor, batch: Batch) -> Tensor:
        revealed = torch.cat([outputs[i] for i in batch.indices]).float()
        return soft_loss(logits, revealed, TEMPERATURE)

    models = {"teacher": teacher}
    for name, loss in (("student", distillation), ("baseline", hard_loss)):
        print(name)
        models[name] = new_model(task, width=56, layers=2, seed=1)
        train(models[name], transfer, loss, STUDENT_STEPS, learning_rate=0.006)

    answers = {name: answers_of(model, task, test) for name, model in models.items()}
    print(f"{'':<10} parameters  word errors  same answer as the teacher")
    for name, model in models.items():
        wrong = task.grade(test.ids, answers[name])["wrong"].mean()
        same = np.mean([a == b for a, b in zip(answers[name], answers["teacher"], strict=True)])
        size = sum(parameter.numel() for parameter in model.parameters())
        print(f"{name:<10} {size:>10,}  {100 * wrong:>9.1f} %  {100 * same:>23.1f} %")


if __name__ == "__main__":
    main()
