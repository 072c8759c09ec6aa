"""Evidence without a mark: valid for innocent students, and strong for the others."""

import numpy as np
import pytest
import torch
from torch import nn

from configs.schema import Model
from measure.provenance import (
    accusations,
    closeness,
    closeness_by_scores,
    closeness_by_text,
    holm,
    likelihood,
    relative_closeness,
    sent_or_kept,
)
from models.language import build_model, initialise
from tasks.pronounce import Pronounce

SHAPE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def students(draw, count, nearer=0.0):
    """Closeness to A, B and C: what students share, chance, and for some what they learned of A."""
    common = draw.normal(-0.5, 0.2, count)
    own = draw.normal(0, 0.02, (count, 3))
    own[:, 0] += nearer
    return [dict(zip("ABC", c + o, strict=True)) for c, o in zip(common, own, strict=True)]


def test_innocent_students_are_accused_as_often_as_the_level_says():
    draw, wrong = np.random.Generator(np.random.PCG64(0)), {0.05: 0, 0.001: 0}
    for _ in range(2000):
        *innocent, suspect = students(draw, 9)
        smallest = min(one.p for one in accusations(suspect, innocent))
        for level in wrong:
            wrong[level] += smallest <= level
    assert 0.03 <= wrong[0.05] / 2000 <= 0.065
    assert wrong[0.001] / 2000 <= 0.004


def test_a_student_is_attributed_to_its_teacher_and_to_no_other():
    draw = np.random.Generator(np.random.PCG64(1))
    for _ in range(50):
        innocent, (suspect,) = students(draw, 8), students(draw, 1, nearer=0.4)
        assert [one.candidate for one in accusations(suspect, innocent) if one.holds] == ["A"]


def test_a_student_of_an_unlisted_teacher_is_attributed_to_none():
    draw, accused = np.random.Generator(np.random.PCG64(2)), 0
    for _ in range(500):
        innocent, (suspect,) = students(draw, 8), students(draw, 1)
        better = {name: value + 0.3 for name, value in suspect.items()}  # of all alike
        accused += any(one.holds for one in accusations(better, innocent))
    assert accused <= 3


def test_what_candidates_share_cancels():
    assert relative_closeness({"A": 1.0, "B": 3.0, "C": 5.0}) == {"A": -3.0, "B": 0.0, "C": 3.0}


def test_p_values_are_corrected_for_their_number():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]


def test_answers_that_nobody_saw_have_uniform_p_values():
    draw = np.random.Generator(np.random.PCG64(3))
    ps = []
    for _ in range(1000):
        scores = draw.normal(size=(30, 5))
        ps.append(sent_or_kept(scores[:, 0], scores[:, 1:]))
    for level in (0.5, 0.05, 0.01):
        assert np.mean(np.array(ps) <= level) == pytest.approx(level, abs=3 * (level / 1000) ** 0.5)


def test_answers_that_were_learned_are_told_from_those_that_were_kept():
    draw = np.random.Generator(np.random.PCG64(4))
    scores = draw.normal(size=(60, 5))
    scores[:, 0] += 1
    assert sent_or_kept(scores[:, 0], scores[:, 1:]) < 1e-6


def test_equal_answers_are_ranked_by_chance():
    same = np.zeros((200, 4))
    assert 0.001 < sent_or_kept(same[:, 0], same[:, 1:]) < 0.999


class Fixed(nn.Module):
    """The same distribution after every token."""

    def __init__(self, logits):
        super().__init__()
        self.register_buffer("logits", logits)

    def forward(self, input_ids, **options):
        shape = (*input_ids.shape, len(self.logits))
        return type("Output", (), {"logits": self.logits.expand(shape)})


def test_closeness_is_a_mean_of_divergences():
    task = Pronounce(limit=300)
    rows = task.rows("validation").take(np.arange(10))
    a, b = (
        torch.randn(task.vocabulary, generator=torch.Generator().manual_seed(s)) for s in (0, 1)
    )
    kl = (a.softmax(-1) * (a.log_softmax(-1) - b.log_softmax(-1))).sum()
    found = closeness({"A": Fixed(a), "B": Fixed(b)}, Fixed(b), task, rows)
    assert found["A"] == pytest.approx(-float(kl), rel=1e-5)
    assert found["B"] == pytest.approx(0, abs=1e-9)


def test_a_likelihood_is_that_of_a_whole_completion():
    task = Pronounce(limit=300)
    rows = task.rows("validation").take(np.arange(10))
    model = initialise(build_model(Model(**SHAPE), task), 0).eval()
    for i, found in enumerate(likelihood(model, task, rows)):
        tokens = torch.tensor([[*rows.prompt(i), *rows.completion(i)]])
        log_probs = model(tokens).logits[0, :-1].detach().log_softmax(-1)
        start = int(rows.prompt_lengths[i]) - 1
        expected = log_probs[start:].gather(-1, tokens[0, start + 1 :, None]).sum()
        assert found == pytest.approx(float(expected), rel=1e-4)


def test_text_and_scores_are_mean_log_probabilities():
    task = Pronounce(limit=300)
    rows = task.rows("validation").take(np.arange(10))
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, task.vocabulary, generator=generator)
    tokens = np.concatenate([rows.completion(i) for i in range(len(rows))])
    expected = {name: float(x.log_softmax(-1)[tokens].mean()) for name, x in (("a", a), ("b", b))}
    by_text = closeness_by_text({"a": Fixed(a), "b": Fixed(b)}, task, rows)
    assert by_text == pytest.approx(expected, rel=1e-5)
    by_scores = closeness_by_scores(Fixed(a), task, {"x": rows})
    assert by_scores == pytest.approx({"x": expected["a"]}, rel=1e-5)
