"""How answers look at each endpoint, built from the types of OpenAI's client."""

from typing import Any

from openai.types import Completion, CompletionUsage
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.completion_choice import CompletionChoice, Logprobs

from models.vocabulary import bytes_of
from teacher.api.requests import ChatRequest, CompletionRequest
from teacher.api.service import Answer, Service, alternatives_of


class Shape:
    """How answers look at one endpoint."""

    id_prefix, alternatives, logprobs, echo = "", 0, False, False

    def __init__(self, body: Any, service: Service) -> None:
        self.body, self.service, self.created = body, service, int(service.store.clock())
        self.sent: dict[int, tuple[int, int]] = {}  # by answer: characters and tokens sent

    def begin(self, request_id: str, prompt: list[int]) -> None:
        self.id = f"{self.id_prefix}-{request_id.removeprefix('req-')}"
        self.prompt = prompt

    def common(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "created": self.created, "model": self.service.model, "object": kind}

    def usage(self, answers: list[Answer]) -> CompletionUsage:
        used = sum(len(answer.steps) for answer in answers)
        return CompletionUsage(
            prompt_tokens=len(self.prompt), completion_tokens=used,
            total_tokens=len(self.prompt) + used,
        )  # fmt: skip

    def news(self, answer: Answer) -> tuple[str, list]:
        """The text and the steps that were not sent yet."""
        characters, steps = self.sent.get(answer.index, (0, 0))
        self.sent[answer.index] = (len(answer.text), len(answer.steps))
        return answer.text[characters:], answer.steps[steps:]


class ChatShape(Shape):
    id_prefix = "chatcmpl"

    def __init__(self, body: ChatRequest, service: Service) -> None:
        super().__init__(body, service)
        self.logprobs, self.alternatives = bool(body.logprobs), body.top_logprobs or 0
        if self.logprobs:
            self.alternatives = max(1, self.alternatives)  # that of the token itself
        self.shown = body.top_logprobs or 0

    def logprobs_of(self, steps: list) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        return {"content": [self.entry(*step) for step in steps], "refusal": None}

    def entry(self, token: int, log_probs: Any) -> dict[str, Any]:
        pairs = alternatives_of(log_probs, self.shown) if self.shown else []
        named = [self.named(*pair) for pair in pairs]
        return self.named(token, float(log_probs[token])) | {"top_logprobs": named}

    def named(self, token: int, log_prob: float) -> dict[str, Any]:
        name = self.service.prompts.token_name(token)
        return {"token": name, "logprob": log_prob, "bytes": [*bytes_of(name)]}

    def whole(self, answers: list[Answer]) -> ChatCompletion:
        choices = [
            {
                "index": answer.index,
                "finish_reason": answer.finish_reason,
                "message": {"role": "assistant", "content": answer.text, "refusal": None},
                "logprobs": self.logprobs_of(answer.steps),
            }
            for answer in answers
        ]
        found = self.common("chat.completion") | {"choices": choices}
        return ChatCompletion(**found, usage=self.usage(answers))

    def part(self, index: int, delta: dict[str, Any], **more: Any) -> ChatCompletionChunk:
        choice = {"index": index, "delta": delta, "finish_reason": None, **more}
        return ChatCompletionChunk(**self.common("chat.completion.chunk"), choices=[choice])

    def opening(self, count: int) -> list[ChatCompletionChunk]:
        return [self.part(i, {"role": "assistant", "content": ""}) for i in range(count)]

    def chunk(self, answer: Answer) -> ChatCompletionChunk:
        text, steps = self.news(answer)
        return self.part(
            answer.index, {"content": text} if text else {}, finish_reason=answer.finish_reason,
            logprobs=self.logprobs_of(steps),
        )  # fmt: skip

    def usage_chunk(self, answers: list[Answer]) -> ChatCompletionChunk:
        found = self.common("chat.completion.chunk")
        return ChatCompletionChunk(**found, choices=[], usage=self.usage(answers))


class CompletionShape(Shape):
    id_prefix = "cmpl"

    def __init__(self, body: CompletionRequest, service: Service) -> None:
        super().__init__(body, service)
        self.logprobs, self.alternatives = body.logprobs is not None, body.logprobs or 0
        self.echo, self.echoed = bool(body.echo), None
        if self.logprobs:
            self.alternatives = max(1, self.alternatives)

    def logprobs_of(self, steps: list) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        name = self.service.prompts.token_name
        return {
            "tokens": [name(token) for token, _ in steps],
            "token_logprobs": [float(log_probs[token]) for token, log_probs in steps],
            "top_logprobs": [
                {name(t): value for t, value in alternatives_of(log_probs, self.body.logprobs or 0)}
                for _, log_probs in steps
            ],
            "text_offset": None,
        }

    def choice(self, answer: Answer, text: str, steps: list) -> dict[str, Any]:
        return {
            "index": answer.index, "finish_reason": answer.finish_reason or "length", "text": text,
            "logprobs": self.logprobs_of(steps),
        }  # fmt: skip

    def whole(self, answers: list[Answer]) -> Completion:
        choices = [self.choice(answer, answer.text, answer.steps) for answer in answers]
        if self.echo:
            choices = [self.with_prompt(choice) for choice in choices]
        found = self.common("text_completion") | {"choices": choices}
        return Completion(**found, usage=self.usage(answers))

    def with_prompt(self, choice: dict[str, Any]) -> CompletionChoice:
        """The prompt before the answer, and its log-probabilities: none of the first token, which
        the client's types have no word for."""
        name = self.service.prompts.token_name
        found = choice | {"text": f"{self.prompt_text}{choice['text']}"}
        if self.logprobs:
            rows = [] if self.echoed is None else self.echoed
            scored = self.logprobs_of([*zip(self.prompt[1:], rows, strict=True)])
            first = {"tokens": name(self.prompt[0]), "token_logprobs": None, "top_logprobs": None}
            lists = {
                key: [value, *scored[key], *choice["logprobs"][key]] for key, value in first.items()
            }
            found["logprobs"] = Logprobs.model_construct(**lists)
        return CompletionChoice.model_construct(**found)

    @property
    def prompt_text(self) -> str:
        prompt = self.body.prompt
        return prompt if isinstance(prompt, str) else self.service.prompts.render(prompt)

    def opening(self, count: int) -> list[Completion]:
        return []

    def chunk(self, answer: Answer) -> Completion:
        choice = self.choice(answer, *self.news(answer)) | {"finish_reason": answer.finish_reason}
        # The client's type has no None here, but its stream does until the end.
        return Completion.model_construct(**self.common("text_completion"), choices=[choice])

    def usage_chunk(self, answers: list[Answer]) -> Completion:
        found = self.common("text_completion")
        return Completion(**found, choices=[], usage=self.usage(answers))
