"""An endpoint of OpenAI's API as a source of outputs: what anybody with a key can collect.

Many requests are in flight. Every answer is in a journal before it is used, so that a run that was
killed asks for none of them again. A budget is reserved before a request is sent, and what the
answer did not use is given back. What a server charges for answers that were lost on the way, and
which the client requests again, is not known here.
"""

import json
import math
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from openai import APIConnectionError, APIStatusError, RateLimitError

from configs.schema import Api, LabError
from models.rows import Rows, row_id
from models.vocabulary import bytes_of
from tasks.task import Task
from teacher.access import ACCESS
from teacher.journal import Answer, Journal, Spending
from teacher.offer import Offer, client_of, problem
from teacher.source import TeacherRow

WAIT = 10.0  # seconds before the next try after a rate limit that does not say how many
PROBE = -1  # in the journal, the answer that shows what an endpoint reveals
ROUNDING = 1e-3  # of the sum of all probabilities
MOST_UNREADABLE = 0.1  # of the answers


class Unreadable(LabError):
    """An answer that the task or the student's tokenizer cannot read."""


class Endpoint:
    """Answers prompts by asking an endpoint. access: what of its distributions is asked for; k: how
    many log-probabilities with access top_k. seed: of the answers, where the endpoint honours one.
    """

    flops = 0.0  # of this machine

    def __init__(
        self,
        task: Task,
        offer: Offer,
        settings: Api,
        access: str,
        k: int | None,
        journal: Journal,
        seed: int,
    ) -> None:
        self.task, self.offer, self.settings = task, offer, settings
        # how many log-probabilities to ask for at each token
        self.alternatives = ACCESS[access].sold(k, task.vocabulary)
        self.journal, self.seed = journal, seed
        self.client = client_of(offer.url, offer.key)
        self.spending = Spending(
            offer, settings.budget_tokens, settings.budget_money, *journal.totals()
        )
        self.asked, self.unreadable, self.reason = 0, 0, ""
        self.stopped = threading.Event()

    def close(self) -> None:
        self.client.close()
        self.journal.database.close()

    def origin(self) -> dict[str, Any]:
        """Whose answers they are, and on which terms they were bought."""
        return {
            "url": self.settings.url,
            "model": self.offer.model,
            "terms": self.offer.terms,
            "allows_distillation": self.offer.allows_distillation,
            "permission": self.settings.permission,
        }

    def bill(self) -> dict[str, Any]:
        """The money is what the endpoint charges, not the time of this machine."""
        spent = self.spending
        return {
            "money": spent.money,
            "requests": spent.requests,
            "prompt_tokens": spent.prompt_tokens,
            "completion_tokens": spent.completion_tokens,
        }

    def answer(
        self, rows: Rows, temperature: float, probabilities: bool, generator: torch.Generator
    ) -> Iterator[TeacherRow]:
        """Answer the prompts of some rows: those in the journal first, then the others as the
        answers arrive, but for those that the task cannot read. LabError if the endpoint refuses,
        or if the budget is spent; what was answered is kept."""
        waiting: deque[int] = deque()
        for i in range(len(rows)):
            known = self.journal.get(int(rows.ids[i]))
            if known is None:
                waiting.append(i)
            else:
                yield from self.read_row(rows, i, known)
        pool, asked = ThreadPoolExecutor(self.settings.at_once), {}
        try:
            while waiting or asked:
                # the first answer shows how many tokens a server adds to a prompt
                most = self.settings.at_once if self.spending.requests else 1
                while waiting and len(asked) < most:
                    i = waiting[0]
                    question = self.task.question(rows, i)
                    longest = self.longest(question)
                    if not self.spending.reserve(i, len(question.encode()), longest):
                        break
                    row = int(rows.ids[waiting.popleft()])
                    asked[pool.submit(self.ask, row, question, longest, temperature)] = i
                if not asked:
                    raise self.budget_spent(len(waiting), len(rows))
                for future in wait(asked, return_when=FIRST_COMPLETED).done:
                    i = asked.pop(future)
                    answer, used = future.result()
                    self.spending.settle(i, *used)
                    yield from self.read_row(rows, i, answer)
        finally:
            if waiting or asked:  # an error: end the waits for rate limits
                self.stopped.set()
            pool.shutdown(cancel_futures=True)  # answers in flight are paid for: into the journal
            self.stopped.clear()

    def budget_spent(self, left: int, rows: int) -> LabError:
        return LabError(
            f"the budget of {self.offer.url} is spent, with {left} of {rows} rows not answered; "
            "raise teacher.api.budget_tokens or budget_money, or lower outputs.transfer_rows"
        )

    def longest(self, question: str) -> int:
        """How many tokens an answer may have."""
        room = self.task.longest_row - len(self.task.prompt(question))
        return max(1, min(self.task.longest_answer, room))

    def read_row(self, rows: Rows, i: int, answer: Answer) -> Iterator[TeacherRow]:
        """The row of an answer; none if the task cannot read it. LabError if there are many."""
        self.asked += 1
        if not len(answer.tokens):
            self.unreadable += 1
            if self.unreadable > max(10, MOST_UNREADABLE * self.asked):
                raise LabError(
                    f"task {self.task.name} cannot read {self.unreadable} of the answers of "
                    f"{self.offer.model}; is it a model for this task?{self.reason}"
                )
            return
        length = int(rows.prompt_lengths[i])
        count = min(len(answer.tokens), self.task.longest_row - length)
        tokens = np.concatenate([rows.prompt(i), answer.tokens[:count]])
        log_probs = None
        if self.alternatives:
            log_probs = answer.distribution(count, self.task.vocabulary)
        yield TeacherRow(i, int(rows.ids[i]), tokens, length, log_probs)

    def require_revealed(self, question: str) -> None:
        """LabError if the endpoint does not reveal what is to be learned from: as it states or, if
        it does not, as an answer of one token shows."""
        if not self.alternatives:
            return
        if self.offer.access is None:
            known = self.journal.get(PROBE)
            if known is None or not len(known.tokens):
                if not self.spending.reserve(PROBE, len(question.encode()), 1):
                    raise self.budget_spent(1, 1)
                self.spending.settle(PROBE, *self.ask(PROBE, question, 1, 0.0)[1])
            return
        most = ACCESS[self.offer.access].sold(self.offer.k, self.task.vocabulary)
        if most < self.alternatives:
            raise LabError(
                f"this key of {self.offer.url} is shown at most {most} log-probabilities per "
                f"token, and the recipe learns from {self.alternatives}"
            )

    # -- one request ---------------------------------------------------------------------------

    def ask(
        self, row: int, question: str, longest: int, temperature: float
    ) -> tuple[Answer, tuple[int, int]]:
        """(the answer, the tokens of prompt and answer that were charged), in the journal."""
        asked = {
            "model": self.offer.model,
            "max_tokens": longest,
            "temperature": temperature,
            "seed": row_id(f"{self.seed} {row}") % 2**31,
            "extra_body": self.settings.body,
        }
        if temperature:  # not whatever part of the distribution the server draws from by default
            asked["top_p"] = 1.0
        body = self.send_with_retries(partial(self.send, question, asked))
        used = len(question.encode()) + self.spending.overhead, longest  # if it does not say
        try:
            found = json.loads(body)
            usage = found.get("usage") or {}
            used = usage.get("prompt_tokens", used[0]), usage.get("completion_tokens", used[1])
            answer = self.read(found["choices"][0])
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            answer = Answer.of([], [])  # paid, whatever it is
        except LabError as error:
            answer = Answer.of([], [])
            if row == PROBE or not isinstance(error, Unreadable):
                self.journal.add(row, used, answer)
                raise
            self.reason = f" ({error})"
        self.journal.add(row, used, answer)
        return answer, used

    def send(self, question: str, asked: dict[str, Any]) -> bytes:
        """The body of the response; the client's own types would take longer to build than the
        answer to write."""
        count = self.alternatives
        if self.settings.endpoint == "completions":
            more = {"logprobs": count} if count else {}
            api = self.client.completions.with_raw_response
            return api.create(prompt=question, **asked, **more).content
        more = {"logprobs": True, "top_logprobs": count} if count else {}
        api = self.client.chat.completions.with_raw_response
        messages = [{"role": "user", "content": question}]
        return api.create(messages=messages, **asked, **more).content

    def send_with_retries(self, send: Callable[[], bytes]) -> bytes:
        """Again after a rate limit, for as long as it takes; the client itself tries again after
        errors of the network or the server. LabError for what will not pass."""
        while True:
            try:
                return send()
            except RateLimitError as error:
                headers = error.response.headers
                if error.code == "insufficient_quota" or headers.get("x-should-retry") == "false":
                    raise problem(self.offer.url, error) from None
                self.pause(headers.get("retry-after", ""))
            except (APIStatusError, APIConnectionError) as error:
                raise problem(self.offer.url, error) from None

    def pause(self, retry_after: str) -> None:
        """Wait as long as the server says; LabError if the others have failed meanwhile."""
        seconds = float(retry_after) if retry_after.isdecimal() else WAIT
        if self.stopped.wait(seconds):
            raise LabError(f"{self.offer.url} was being waited for")

    # -- reading an answer ---------------------------------------------------------------------

    @cached_property
    def ids(self) -> dict[bytes, int]:
        """{the text of a token: its id}. Some servers show no text for the end mark."""
        names = map(self.task.token_name, range(self.task.vocabulary))
        return {b"": self.task.end} | {bytes_of(name): token for token, name in enumerate(names)}

    def id_of(self, name: str, text: list[int] | None = None) -> int:
        """The token of a name or, where they are known, of its bytes: servers write a part of a
        letter in different ways. Unreadable if the student has no such token."""
        found = self.ids.get(bytes_of(name) if text is None else bytes(text))
        if found is None:
            raise Unreadable(
                f"{self.offer.model} has other tokens than its student, such as {name!r}: use "
                "access text, or a task with its tokenizer"
            )
        return found

    def read(self, choice: dict[str, Any]) -> Answer:
        """An answer in the student's tokens. Unreadable if it has none."""
        ended, end = choice["finish_reason"] == "stop", self.task.end
        if not self.alternatives:
            text = choice["text"] if "text" in choice else choice["message"]["content"]
            try:
                tokens = self.task.encode_answer(text) + [end] * ended
            except LabError as error:
                raise Unreadable(str(error)) from None
            return Answer.of(tokens, [{} for _ in tokens])
        tokens, pairs = self.revealed(choice)
        if ended and end not in tokens[-1:]:  # some endpoints do not show the end mark
            tokens.append(end)
            pairs.append({end: 0.0})
        return Answer.of(tokens, pairs)

    def revealed(self, choice: dict[str, Any]) -> tuple[list[int], list[dict[int, float]]]:
        """An answer's tokens, and at each of them {outcome: log-probability}. LabError for an
        answer without, Unreadable for one in other tokens than the student's."""
        found = choice.get("logprobs") or {}
        if "content" in found:
            tokens = [self.id_of(one["token"], one.get("bytes")) for one in found["content"]]
            pairs = [
                [
                    (self.id_of(o["token"], o.get("bytes")), o["logprob"])
                    for o in one["top_logprobs"]
                ]
                for one in found["content"]
            ]
        else:
            tokens = [*map(self.id_of, found.get("tokens") or [])]
            pairs = [
                [(self.id_of(name), value) for name, value in one.items()]
                for one in found.get("top_logprobs") or []
            ]
        fewest = min(map(len, pairs), default=0)
        if not tokens or not fewest:
            raise LabError(
                f"{self.offer.url} reveals no log-probabilities of {self.offer.model}: use access "
                "text"
            )
        if fewest < self.alternatives and any(mass_of(one) < 1 - ROUNDING for one in pairs):
            raise LabError(
                f"{self.offer.url} reveals {fewest} log-probabilities per token, and the recipe "
                f"learns from {self.alternatives}: use access top_k with a smaller outputs.k"
            )
        # Of several that mean the same here, the likeliest, which comes first.
        return tokens, [dict(reversed(one)) for one in pairs]


def mass_of(pairs: list[tuple[int, float]]) -> float:
    """The probability of these outcomes together. Outcomes that are impossible may be missing."""
    return sum(math.exp(value) for _, value in pairs)
