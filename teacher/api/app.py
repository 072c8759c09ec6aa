"""The endpoints of OpenAI's API: /v1/models, /v1/chat/completions, /v1/completions.

Responses are built from the types of OpenAI's client: see shapes.py.
"""

import asyncio
import hashlib
import hmac
import json
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, Response, StreamingResponse
from openai.types import Model
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException

from teacher.api.errors import ApiError
from teacher.api.requests import ChatRequest, CompletionRequest, Sampling
from teacher.api.service import (
    KEEP_CONTENTS,
    Answer,
    Service,
    fields_of,
)
from teacher.api.shapes import ChatShape, CompletionShape, Shape
from teacher.api.store import Account

LATEST = 20  # requests that an account is shown
LARGEST_BODY = 1_000_000  # bytes
BODY_SECONDS = 30.0  # in which it must arrive
BodyType = TypeVar("BodyType", bound=Sampling)


def create_app(service: Service, salt: bytes) -> FastAPI:
    """salt: of the hashes of addresses in the log."""
    app = FastAPI(title="Distillation Lab API", docs_url=None, redoc_url=None)

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> JSONResponse:
        return error.response(getattr(request.state, "request_id", None))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        known = {401: "wrong_password", 404: "not_found", 405: "method_not_allowed"}
        status = error.status_code if error.status_code in known else 400
        code = known.get(status, "invalid_request")
        response = ApiError(status, code, str(error.detail)).response()
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def our_error(request: Request, error: Exception) -> JSONResponse:
        request_id = getattr(request.state, "request_id", None)
        if request_id:
            service.store.finish(request_id, 0, "failed", error_code="server_error")
        return ApiError(500, "server_error", "an error of the server", retry_after=1).response()

    app.openapi = lambda: openapi_of(app)

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        service.account(request.headers.get("authorization"))
        return json_of({"object": "list", "data": [described(service).model_dump()]})

    @app.get("/v1/models/{name}")
    async def model(request: Request, name: str) -> Response:
        service.account(request.headers.get("authorization"))
        service.require_model(name)
        return json_of(described(service))

    @app.get("/v1/account")
    async def account(request: Request) -> Response:
        found = service.account(request.headers.get("authorization"))
        return json_of(service.statement(found))

    @app.get("/v1/account/usage")
    async def usage(request: Request) -> Response:
        found = service.account(request.headers.get("authorization"))
        return json_of({"object": "list", "data": service.store.latest(found.id, LATEST)})

    @app.post("/v1/chat/completions", openapi_extra=reads(ChatRequest))
    async def chat(request: Request) -> Response:
        account = service.account(request.headers.get("authorization"))
        body = await read(request, ChatRequest)
        messages = [message.model_dump(exclude_none=True) for message in body.messages]
        prompt = service.prompts.chat(messages)
        asked = body.max_completion_tokens or body.max_tokens
        text = json.dumps(messages, ensure_ascii=False)
        work = Work(service, request, account, body, prompt, text, asked, salt)
        return await work.respond(ChatShape(body, service))

    @app.post("/v1/completions", openapi_extra=reads(CompletionRequest))
    async def complete(request: Request) -> Response:
        account = service.account(request.headers.get("authorization"))
        body = await read(request, CompletionRequest)
        text = body.prompt if isinstance(body.prompt, str) else json.dumps(body.prompt)
        prompt = service.prompts.raw(text) if isinstance(body.prompt, str) else body.prompt
        if any(not 0 <= token < service.prompts.vocabulary for token in prompt):
            raise ApiError(400, "invalid_token", "prompt has ids that are no tokens", "prompt")
        asked = 16 if body.max_tokens is None else body.max_tokens
        if body.echo and body.stream:
            raise ApiError(400, "invalid_value", "echo: not with stream", "echo")
        if not (asked or body.echo):
            raise ApiError(400, "invalid_value", "max_tokens: 0 needs echo", "max_tokens")
        work = Work(service, request, account, body, prompt, text, asked, salt)
        return await work.respond(CompletionShape(body, service))

    return app


COMPONENT = "#/components/schemas/{model}"


def reads(kind: type[Sampling]) -> dict[str, Any]:
    """The body of an endpoint, for /openapi.json: the endpoints read it themselves, after the
    key."""
    schema = {"$ref": COMPONENT.format(model=kind.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def openapi_of(app: FastAPI) -> dict[str, Any]:
    """The description of the API: bodies, keys, and errors in OpenAI's shape."""
    found = get_openapi(title=app.title, version="1", routes=app.routes)
    parts = found.setdefault("components", {}).setdefault("schemas", {})
    for kind in (ChatRequest, CompletionRequest):
        schema = kind.model_json_schema(ref_template=COMPONENT)
        parts |= schema.pop("$defs", {}) | {kind.__name__: schema}
    parts["Error"] = {
        "type": "object", "required": ["error"],
        "properties": {
            "error": {
                "type": "object", "required": ["message", "type", "param", "code"],
                "properties": {
                    "message": {"type": "string"}, "type": {"type": "string"},
                    "param": {"type": ["string", "null"]}, "code": {"type": "string"},
                },
            }
        },
    }  # fmt: skip
    found["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    found["security"] = [{"key": []}]
    error = {"$ref": COMPONENT.format(model="Error")}
    for operation in (one for path in found["paths"].values() for one in path.values()):
        operation["responses"].pop("422", None)
        operation["responses"]["default"] = {
            "description": "an error", "content": {"application/json": {"schema": error}},
        }  # fmt: skip
    return found


def described(service: Service) -> Model:
    return Model(id=service.model, created=service.created, object="model", owned_by="lab")


def json_of(content: BaseModel | dict[str, Any], headers: dict[str, str] | None = None) -> Response:
    if isinstance(content, BaseModel):
        text = content.model_dump_json(exclude_unset=True)
    else:
        text = json.dumps(content, ensure_ascii=False, allow_nan=False)
    return Response(text, media_type="application/json", headers=headers)


async def read(request: Request, kind: type[BodyType]) -> BodyType:
    """The body of a request. ApiError for one that is too large, no JSON, or not of this kind."""
    received = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                received += part
                if len(received) > LARGEST_BODY:
                    raise ApiError(413, "body_too_large", f"the body exceeds {LARGEST_BODY} bytes")
    except TimeoutError:
        raise ApiError(
            408, "body_too_slow", f"the body did not arrive within {BODY_SECONDS} seconds"
        ) from None
    try:
        content = json.loads(received.decode("utf-8"))
    except UnicodeDecodeError:
        raise ApiError(400, "invalid_json", "the body is not UTF-8") from None
    except (ValueError, RecursionError):
        raise ApiError(400, "invalid_json", "the body is not JSON") from None
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or None
        known = {"extra_forbidden": ("unsupported_field", "this field is not supported")}
        code, message = known.get(first["type"], ("invalid_value", first["msg"]))
        where = f"{place}: " if place else ""
        raise ApiError(400, code, f"{where}{message}", place) from None


class Work:
    """One request that passed its key: limits, usage row, answers, response."""

    def __init__(
        self,
        service: Service,
        request: Request,
        account: Account,
        body: Sampling,
        prompt: list[int],
        text: str,
        asked: int | None,
        salt: bytes,
    ) -> None:
        self.service, self.request, self.account = service, request, account
        self.body, self.prompt, self.text, self.salt = body, prompt, text, salt
        self.longest = service.room(prompt, asked)

    async def respond(self, shape: Shape) -> Response:
        bias = self.service.require_exposure(self.account, shape.alternatives, self.body)
        count = self.body.n or 1
        reserved = len(self.prompt) + count * self.longest
        self.service.require_model(self.body.model)
        self.service.require_rate(self.account, reserved)
        request_id = self.begin(reserved, shape)
        self.request.state.request_id = request_id
        shape.begin(request_id, self.prompt)
        jobs = self.service.jobs(self.body, self.prompt, self.longest, bias, shape.logprobs)
        if self.body.stream:
            return StreamingResponse(
                self.stream(request_id, jobs, shape),
                media_type="text/event-stream",
                headers={"x-request-id": request_id, "cache-control": "no-store"},
            )
        if shape.echo:
            shape.echoed = await self.service.scored(self.prompt) if len(self.prompt) > 1 else None
        found = await self.whole(request_id, jobs)
        if found is None:
            return Response(status_code=499)  # as nginx writes it in its log; nobody reads it
        return json_of(shape.whole(found), {"x-request-id": request_id})

    def begin(self, reserved: int, shape: Shape) -> str:
        """The usage row. ApiError if the quota of the day does not hold the request."""
        address = self.request.client.host if self.request.client else ""
        request_id = self.service.store.begin(
            self.account,
            reserved,
            endpoint=self.request.url.path,
            ip_hash=hmac.new(self.salt, address.encode(), hashlib.sha256).hexdigest()[:16],
            user_agent=self.request.headers.get("user-agent", "")[:200],
            prompt_tokens=len(self.prompt),
            max_tokens=self.longest,
            logprobs=int(shape.logprobs),
            top_logprobs=shape.alternatives,
            **fields_of(self.body, self.text),
        )
        if request_id is None:
            raise ApiError(
                429, "insufficient_quota",
                f"the {self.account.tier.tokens_per_day} tokens per day of tier "
                f"{self.account.tier_name} do not hold this request",
            )  # fmt: skip
        return request_id

    def finish(self, request_id: str, answers: dict[int, Answer], status: str) -> None:
        used = sum(len(answer.steps) for answer in answers.values())
        reasons = {answer.finish_reason for answer in answers.values()}
        text = "\n".join(answers[index].text for index in sorted(answers))
        self.service.store.finish(
            request_id,
            used,
            status,
            finish_reason=reasons.pop() if len(reasons) == 1 else "mixed",
            content=(self.text, text, KEEP_CONTENTS),
        )

    async def whole(self, request_id: str, jobs: list) -> list[Answer] | None:
        """All answers; None if the client is gone, which ends them."""
        answers: dict[int, Answer] = {}
        gone = asyncio.create_task(disconnected(self.request))
        status = "disconnected"
        try:
            growing = self.service.answers(jobs, self.body.stops)
            async for answer in growing:
                answers[answer.index] = answer
                if gone.done():
                    await growing.aclose()
                    break
            else:
                status = "done"
        finally:
            gone.cancel()
            self.finish(request_id, answers, status)
        if status == "disconnected":
            return None
        return [answers[index] for index in sorted(answers)]

    async def stream(self, request_id: str, jobs: list, shape: Shape) -> AsyncIterator[bytes]:
        """Server-sent events; ends the answers if the client is gone."""
        answers: dict[int, Answer] = {}
        status, growing = "disconnected", self.service.answers(jobs, self.body.stops)
        try:
            for chunk in shape.opening(len(jobs)):
                yield event(chunk)
            async for answer in growing:
                answers[answer.index] = answer
                yield event(shape.chunk(answer))
            if self.body.stream_options and self.body.stream_options.include_usage:
                yield event(shape.usage_chunk([*answers.values()]))
            status = "done"
            self.finish(request_id, answers, status)  # before the client knows
            yield b"data: [DONE]\n\n"
        finally:
            with suppress(RuntimeError):
                await growing.aclose()
            self.finish(request_id, answers, status)


async def disconnected(request: Request) -> None:
    """Returns when the client has closed the connection."""
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            return


def event(content: BaseModel) -> bytes:
    return f"data: {content.model_dump_json(exclude_unset=True)}\n\n".encode()
