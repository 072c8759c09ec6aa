"""How an answer grows, token by token."""

import itertools
from types import SimpleNamespace

import hypothesis.strategies as st
import pytest
from hypothesis import given

from tasks.pronounce import Pronounce
from tasks.reason import Reason
from tasks.text import Text
from teacher.api.prompts import TaskPrompts
from teacher.api.service import Answer, Service


@pytest.fixture(scope="module", params=["pronounce", "reason", "text"])
def service(request, tmp_path_factory):
    """A service that only renders."""
    if request.param == "text":
        file = tmp_path_factory.mktemp("text") / "texts.txt"
        file.write_text("\n\n".join(f"café number {n}, in the sea" for n in range(300)), "utf-8")
        task = Text(path=str(file), vocabulary=280)
    else:
        task = {"pronounce": Pronounce, "reason": Reason}[request.param](limit=300)
    found = Service.__new__(Service)
    found.prompts, found.task = TaskPrompts(task), task
    return found


def answer_of(service, tokens, stops=()):
    """The text after every token."""
    answer = Answer(0, SimpleNamespace(longest=len(tokens), cancelled=False))
    seen = []
    for token in tokens:
        if not answer.finish_reason:
            service.grow(answer, (token, None), list(stops))
            seen.append(answer.text)
    return answer, seen


@given(st.data())
def test_an_answer_that_grows_is_the_text_of_all_its_tokens(service, data):
    tokens = st.integers(3, service.task.vocabulary - 1)
    tokens = data.draw(st.lists(tokens, min_size=1, max_size=30))
    answer, seen = answer_of(service, tokens)
    assert answer.text == service.task.render(tokens)
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(seen))


def test_a_letter_of_several_tokens_is_sent_when_it_is_complete():
    """It was sent as a replacement character, and then again."""
    parts = {0: "caf", 1: "\ufffd"}

    def render(tokens):
        text = "".join(parts.get(token, "") for token in tokens)
        return text.replace("\ufffd\ufffd", "é")

    service = Service.__new__(Service)
    service.prompts = SimpleNamespace(end=9, render=render)
    _, seen = answer_of(service, [0, 1, 1, 0])
    assert seen == ["caf", "caf", "café", "cafécaf"]
    cut, _ = answer_of(service, [0, 1])
    assert cut.text == "caf\ufffd"


@pytest.mark.parametrize("stop", ["b", "bc", "abc", "cd"])
def test_a_stop_is_found_across_tokens(stop):
    service = Service.__new__(Service)
    service.prompts = SimpleNamespace(
        end=9, render=lambda tokens: "".join("abcdefgh"[t] for t in tokens)
    )
    answer, _ = answer_of(service, [0, 1, 2, 3, 4], [stop])
    assert answer.text == "abcde"[: "abcde".index(stop)]
    assert answer.finish_reason == "stop"
    assert answer.job.cancelled


def test_a_token_costs_the_same_however_long_the_answer_is():
    read = []

    def render(tokens):
        read.append(len(tokens))
        return "x" * len(tokens)

    service = Service.__new__(Service)
    service.prompts = SimpleNamespace(end=9, render=render)
    answer_of(service, [0] * 500)
    assert max(read) <= 2
