"""What a client may ask: OpenAI's request bodies, as far as they are supported. Every other field
is an error: one that is ignored would give another answer than was asked for."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

Stop = Annotated[str, StringConstraints(min_length=1, max_length=100)]
Bias = Annotated[float, Field(ge=-100, le=100)]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(Body):
    include_usage: bool = False


class Sampling(Body):
    """What both endpoints share."""

    model: str = Field(max_length=200)
    max_tokens: int | None = Field(None, ge=0, le=100_000)
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=64)] | None = None
    seed: Annotated[int, Field(ge=-(2**62), le=2**62)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    logit_bias: Annotated[dict[str, Bias], Field(max_length=1_000)] | None = None
    user: str | None = Field(None, max_length=200)

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class Message(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: str = Field(max_length=100_000)
    name: str | None = Field(None, max_length=64)


class ChatRequest(Sampling):
    messages: list[Message] = Field(min_length=1, max_length=100)
    max_completion_tokens: int | None = Field(None, ge=1, le=100_000)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0)

    @model_validator(mode="after")
    def alternatives_need_logprobs(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self


class CompletionRequest(Sampling):
    prompt: str | Annotated[list[int], Field(min_length=1, max_length=100_000)]
    logprobs: int | None = Field(None, ge=0)
    echo: bool | None = None
