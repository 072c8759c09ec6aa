"""Checks of lab 2. Each failure names the likeliest misconception by its signature."""

import pytest
import torch

from labs.checks.tools import close, normal, require_predictions


@pytest.mark.points(2)
def test_counted_positions_predict_the_answer_alone(lab, draw):
    prompts = torch.from_numpy(draw.integers(1, 5, 6))
    lengths = prompts + torch.from_numpy(draw.integers(1, 6, 6))
    width = int(lengths.max()) + 2
    position = torch.arange(width)

    def mask(first, last):
        return (position >= prompts[:, None] + first) & (position < lengths[:, None] + last)

    found = lab.call("counted", prompts, lengths, width)
    assert found.shape == (6, width), f"counted: found shape {[*found.shape]}"
    signatures = {
        "the first token of the answer is not learned: logits predict the NEXT token": mask(0, -1),
        "it marks the answer's tokens, not the positions that predict them": mask(0, 0),
        "the end mark is not learned": mask(-1, -2),
        "padding after the end mark is learned": mask(-1, 0),
        "the prompt is learned, too": (position < lengths[:, None] - 1).expand(6, width),
    }
    for signature, wrong in signatures.items():
        if torch.equal(found.bool(), wrong):
            pytest.fail(f"counted: {signature}")
    assert torch.equal(found.bool(), mask(-1, -1)), "counted: other positions than expected"


@pytest.mark.points(1)
def test_mean_is_over_tokens_not_over_rows(lab, draw):
    values, mask = normal(draw, 4, 9), torch.arange(9) < torch.tensor([[2], [9], [4], [1]])
    found, expected = lab.call("token_mean", values, mask), values[mask].mean()
    rows = torch.stack([values[i][mask[i]].mean() for i in range(4)]).mean()
    if close(found, rows):
        pytest.fail("token_mean: a mean of the rows' means: short answers weigh too much")
    if close(found, (values * mask).mean()):
        pytest.fail("token_mean: divided by all positions, not by those that count")
    assert close(found, expected)
    values[~mask] = float("inf")
    assert torch.isfinite(torch.as_tensor(lab.call("token_mean", values, mask))), (
        "token_mean: what does not count must not matter, even if it is infinite"
    )


@pytest.mark.points(3)
def test_top_k_divergence_has_a_tail(lab, draw):
    student, teacher = normal(draw, 7, 12), normal(draw, 7, 12).log_softmax(-1)
    log_probs, indices = teacher.topk(4)
    q = student.log_softmax(-1).gather(-1, indices)
    inside = (log_probs.exp() * (log_probs - q)).sum(-1)
    tails = [(1 - x.exp().sum(-1)).log() for x in (log_probs, q)]
    expected = inside + tails[0].exp() * (tails[0] - tails[1])
    picked = student.gather(-1, indices).log_softmax(-1)
    found = lab.call("top_k_divergence", student, indices, log_probs)
    signatures = {
        "there is no tail: the sum can be negative": inside,
        "the student's softmax is over the k tokens alone": (
            log_probs.exp() * (log_probs - picked)
        ).sum(-1),
    }  # fmt: skip
    for signature, wrong in signatures.items():
        if close(found, wrong):
            pytest.fail(f"top_k_divergence: {signature}")
    assert close(found, expected), "top_k_divergence: other values than expected"
    same = lab.call("top_k_divergence", teacher, indices, log_probs)
    assert close(same, torch.zeros(7)), "top_k_divergence: not 0 where the student is the teacher"


@pytest.mark.points(2)
def test_step_descends_until_the_student_is_the_teacher(lab, draw):
    inputs, teacher = normal(draw, 8, 16, scale=1.0), normal(draw, 8, 5)
    weights, losses = torch.zeros(16, 5), []
    kept = weights.clone()
    weights, first = lab.call("step", weights, inputs, teacher, 0.5)
    assert torch.equal(kept, torch.zeros(16, 5)), "step: the weights that it was given have changed"
    p = teacher.log_softmax(-1)
    expected = (p.exp() * (p - torch.full_like(p, 0.2).log())).sum(-1).mean()
    if close(first, -(p.exp() * torch.full_like(p, 0.2).log()).sum(-1).mean()):
        pytest.fail("step: the loss is a cross-entropy; it ends at the teacher's entropy, not at 0")
    assert close(first, expected), "step: the loss before the step is another one"
    for _ in range(300):
        weights, loss = lab.call("step", weights, inputs, teacher, 0.5)
        losses.append(float(loss))
    if losses[-1] > losses[0]:
        pytest.fail("step: the loss rises. Do you add the gradient instead of subtracting it?")
    assert losses[-1] < 0.01, f"step: after 300 steps the loss is {losses[-1]:.3f}, expected 0"


@pytest.mark.points(1)
def test_a_prediction_is_made_before_each_exercise_of_lab_2(lab):
    require_predictions(lab, "2.1", "2.2", "2.3", "2.4")
