"""Checks of lab 4: distillers as source, right and broken, half of them not shown in the lab."""

import pytest

from labs.checks.tools import require_predictions

BODY = """
def loss(student, teacher, temperature):
    {}
"""
RIGHT = {
    "written out": """p = F.log_softmax(teacher.detach() / temperature, dim=-1)
    q = F.log_softmax(student / temperature, dim=-1)
    return temperature**2 * (p.exp() * (p - q)).sum(-1).mean()""",
    "of torch": """p = F.log_softmax(teacher.detach() / temperature, dim=-1)
    q = F.log_softmax(student / temperature, dim=-1)
    return temperature**2 * F.kl_div(q, p, reduction="batchmean", log_target=True)""",
    "as two entropies": """p = F.softmax(teacher.detach() / temperature, dim=-1)
    q = F.log_softmax(student / temperature, dim=-1)
    return temperature**2 * ((torch.special.entr(p) * -1).sum(-1) - (p * q).sum(-1)).mean()""",
}
SHOWN = {
    "averaged over classes, too": """p = F.softmax(teacher.detach() / temperature, dim=-1)
    q = F.log_softmax(student / temperature, dim=-1)
    return temperature**2 * F.kl_div(q, p, reduction="none").mean()""",
    "without T^2": """p = F.softmax(teacher.detach() / temperature, dim=-1)
    q = F.log_softmax(student / temperature, dim=-1)
    return F.kl_div(q, p, reduction="batchmean")""",
    "a cross-entropy": """p = F.softmax(teacher.detach() / temperature, dim=-1)
    q = F.log_softmax(student / temperature, dim=-1)
    return -(temperature**2) * (p * q).sum(-1).mean()""",
    "the wrong way round": """p = F.log_softmax(teacher.detach() / temperature, dim=-1)
    q = F.softmax(student / temperature, dim=-1)
    return temperature**2 * F.kl_div(p, q, reduction="batchmean")""",
}
HIDDEN = {
    "a teacher with a gradient": """p = F.log_softmax(teacher / temperature, dim=-1)
    q = F.log_softmax(student / temperature, dim=-1)
    return temperature**2 * (p.exp() * (p - q)).sum(-1).mean()""",
    "the teacher with itself": """p = F.log_softmax(teacher.detach() / temperature, dim=-1)
    q = F.log_softmax(teacher / temperature, dim=-1)
    return temperature**2 * (p.exp() * (p - q)).sum(-1).mean() + 0 * student.sum()""",
    "temperature on one side": """p = F.log_softmax(teacher.detach(), dim=-1)
    q = F.log_softmax(student / temperature, dim=-1)
    return temperature**2 * (p.exp() * (p - q)).sum(-1).mean()""",
    "rows of another order": """p = F.log_softmax(teacher.detach().flip(0) / temperature, dim=-1)
    q = F.log_softmax(student / temperature, dim=-1)
    return temperature**2 * (p.exp() * (p - q)).sum(-1).mean()""",
}


@pytest.mark.points(4)
def test_right_distillers_are_left_alone(lab):
    alarms = [name for name, body in RIGHT.items() if lab.call("verdict_on", BODY.format(body))]
    assert not alarms, f"is_broken: a false alarm on a right distiller ({', '.join(alarms)})"


@pytest.mark.points(1)
@pytest.mark.parametrize("name", SHOWN)
def test_a_shown_bug_is_caught(name, lab):
    require_some_trust(lab)
    caught = lab.call("verdict_on", BODY.format(SHOWN[name]))
    assert caught, f"is_broken: it calls this one right: {name}"


@pytest.mark.hidden
@pytest.mark.points(1)
@pytest.mark.parametrize("name", HIDDEN)
def test_a_hidden_bug_is_caught(name, lab):
    require_some_trust(lab)
    caught = lab.call("verdict_on", BODY.format(HIDDEN[name]))
    assert caught, "is_broken: it calls a broken distiller right that the lab does not show"


def require_some_trust(lab):
    """Who calls everything broken catches nothing."""
    if all(lab.call("verdict_on", BODY.format(body)) for body in RIGHT.values()):
        pytest.fail("is_broken: it calls every right distiller broken, too")


@pytest.mark.points(1)
def test_a_prediction_is_made_before_the_hunt(lab):
    require_predictions(lab, "4.1")
