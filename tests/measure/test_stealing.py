"""The hidden size of a teacher, from what its API shows."""

import numpy as np
import pytest

from measure import stealing
from measure.stealing import as_shown, dimensions
from tasks.pronounce import Pronounce
from teacher.api.defence import Defence
from tests.serving import SHAPE, small_teacher


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    with small_teacher(tmp_path_factory.mktemp("open")) as teacher:
        yield teacher


@pytest.fixture
def stolen(monkeypatch, capsys):
    """What the command prints, with a key of this tier."""

    def steal(served, tier, *more):
        monkeypatch.setenv("LAB_KEY", served.store.add_account("A reader", tier)[1])
        monkeypatch.setattr(stealing, "load_task", lambda config: served.task)
        command = [served.url, "--model", "small", "--task", "pronounce", *map(str, more)]
        code = stealing.main(command)
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return steal


def test_all_log_probabilities_give_the_hidden_size_away(served, stolen):
    vocabulary = served.task.vocabulary
    code, printed = stolen(served, "open-bulk", "--shown", vocabulary, "--positions", 48)
    assert code == 0
    assert printed == f"48 requests\nthe hidden size of small is {SHAPE['hidden_size']}\n"


def test_a_few_with_a_bias_give_it_away_for_more_requests(served, stolen):
    code, printed = stolen(served, "top20-bulk", "--shown", 20, "--positions", 40)
    assert code == 0
    each = -(-(served.task.vocabulary - 1) // 19)
    assert printed == f"{40 * each} requests\nthe hidden size of small is {SHAPE['hidden_size']}\n"


def test_rounding_hides_it(stolen, tmp_path):
    with small_teacher(tmp_path, defence=Defence(decimals=1)) as teacher:
        every = ("--shown", teacher.task.vocabulary, "--positions", 48)
        assert "no dimension stands out" in stolen(teacher, "open-bulk", *every)[1]


def test_what_a_key_is_not_shown_is_one_line(served, stolen):
    code, printed = stolen(served, "text-bulk", "--positions", 8)
    assert code == 2
    assert "tier text-bulk reveals at most 0 log-probabilities" in printed
    assert len(printed.splitlines()) == 1


@pytest.mark.parametrize("size", [3, 17])
def test_dimensions_are_counted_where_rows_suffice(size):
    draw = np.random.Generator(np.random.PCG64(0))
    logits = draw.normal(size=(60, size)) @ draw.normal(size=(size, 40))
    shifted = logits + draw.normal(size=(60, 1))  # each up to a constant
    assert dimensions(shifted) == size
    assert dimensions(shifted[:size]) is None  # too few
    assert dimensions(shifted + draw.normal(0, 1, shifted.shape)) is None


def test_what_is_shown_gives_the_size_away_unless_it_is_rounded():
    draw = np.random.Generator(np.random.PCG64(1))
    logits = 0.1 * draw.normal(size=(60, 12)) @ draw.normal(size=(12, 50))
    found = {how: dimensions(known) for how, known in as_shown(logits).items()}
    assert found == {
        "all": 12, "all, 2 decimals": 12, "all, 1 decimal": None, "20 and logit_bias": 12,
        "20 and logit_bias, 1 decimal": None,
    }  # fmt: skip


def test_the_task_of_a_command_is_a_real_one():
    assert stealing.parser().parse_args(["u", "--model", "m", "--task", Pronounce.name])
