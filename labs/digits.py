"""5,000 handwritten digits and small networks, for labs that need PyTorch alone."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tasks.mnist import LABELS, PIXELS, digits_file, read_packaged


@dataclass(frozen=True)
class Digits:
    """images [N, 784] between 0 and 1, labels [N]."""

    images: Tensor
    labels: Tensor

    def first(self, count: int) -> "Digits":
        return Digits(self.images[:count], self.labels[:count])


def load_digits() -> tuple[Digits, Digits]:
    """4,000 digits to learn from and 1,000 to test on, in a fixed random order."""
    images, labels = (torch.from_numpy(part) for part in read_packaged(digits_file()))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images, labels = images[order].float() / 255, labels[order].long()
    return Digits(images[:4000], labels[:4000]), Digits(images[4000:], labels[4000:])


def new_network(width: int, seed: int) -> nn.Module:
    """Images [N, 784] -> logits [N, 10], with one hidden layer."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(PIXELS, width), nn.ReLU(), nn.Linear(width, LABELS))


def train_teacher(digits: Digits, steps: int = 400) -> nn.Module:
    """A wide network, trained on labels."""
    teacher = new_network(width=256, seed=0)
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=0.003)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        batch = torch.randint(len(digits.labels), (64,), generator=generator)
        loss = F.cross_entropy(teacher(digits.images[batch]), digits.labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return teacher.eval().requires_grad_(False)
