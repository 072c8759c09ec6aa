"""The endpoints of OpenAI's API: /v1/models, /v1/chat/completions, /v1/completions.

Responses are built from the types of OpenAI's client: see shapes.py.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, Response, StreamingResponse
from openai.types import Model
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException

from teacher.api.errors import ApiError
from teacher.api.exchange import Exchange, Origin, hashed_address
from teacher.api.requests import ChatRequest, CompletionRequest, Sampling
from teacher.api.service import Service
from teacher.api.shapes import ChatShape, CompletionShape, Shape

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
        origin = origin_of(request, salt)
        exchange = Exchange(service, origin, account, body, prompt, text, asked)
        return await respond(exchange, request, ChatShape(body, service))

    @app.post("/v1/completions", openapi_extra=reads(CompletionRequest))
    async def complete(request: Request) -> Response:
        account = service.account(request.headers.get("authorization"))
        body = await read(request, CompletionRequest)
        is_text = isinstance(body.prompt, str)
        prompt = service.prompts.raw(body.prompt) if is_text else body.prompt
        if any(not 0 <= token < service.prompts.vocabulary for token in prompt):
            raise ApiError(400, "invalid_token", "prompt has ids that are no tokens", "prompt")
        # ids are logged as text: detectors compare texts
        text = body.prompt if is_text else service.prompts.render(body.prompt)
        asked = 16 if body.max_tokens is None else body.max_tokens
        if body.echo and body.stream:
            raise ApiError(400, "invalid_value", "echo: not with stream", "echo")
        if not (asked or body.echo):
            raise ApiError(400, "invalid_value", "max_tokens: 0 needs echo", "max_tokens")
        origin = origin_of(request, salt)
        exchange = Exchange(service, origin, account, body, prompt, text, asked)
        return await respond(exchange, request, CompletionShape(body, service))

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


def origin_of(request: Request, salt: bytes) -> Origin:
    address = request.client.host if request.client else ""
    return Origin(
        request.url.path,
        hashed_address(address, salt),
        request.headers.get("user-agent", "")[:200],
    )


async def respond(exchange: Exchange, request: Request, shape: Shape) -> Response:
    """The answers in the shape of an endpoint, whole or as they grow."""
    exchange.admit(shape.logprobs, shape.alternatives)
    request_id = request.state.request_id = exchange.request_id
    shape.begin(request_id, exchange.prompt)
    if exchange.body.stream:
        return Streamed(
            exchange,
            stream(exchange, shape),
            media_type="text/event-stream",
            headers={"x-request-id": request_id, "cache-control": "no-store"},
        )
    if shape.echo and len(exchange.prompt) > 1:
        shape.echoed = await exchange.service.scored(exchange.prompt, exchange.watermark)
    gone = asyncio.create_task(disconnected(request))
    try:
        found = await exchange.answers(gone)
    finally:
        gone.cancel()
    if found is None:
        return Response(status_code=499)  # as nginx writes it in its log; nobody reads it
    return json_of(shape.whole(found), {"x-request-id": request_id})


class Streamed(StreamingResponse):
    """Closes the usage row when the client is gone, even before the first byte was asked for."""

    def __init__(self, exchange: Exchange, content: AsyncIterator[bytes], **options: Any) -> None:
        super().__init__(content, **options)
        self.exchange = exchange

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.exchange.finish("disconnected")  # unless it is done


async def stream(exchange: Exchange, shape: Shape) -> AsyncIterator[bytes]:
    """Server-sent events; ends the answers if the client is gone."""
    options = exchange.body.stream_options
    for chunk in shape.opening(len(exchange.jobs)):
        yield event(chunk)
    async with aclosing(exchange.growing()) as growing:
        async for answer in growing:
            yield event(shape.chunk(answer))
    if options and options.include_usage:
        yield event(shape.usage_chunk([*exchange.found.values()]))
    exchange.finish("done")  # before the client knows
    yield b"data: [DONE]\n\n"


async def disconnected(request: Request) -> None:
    """Returns when the client has closed the connection."""
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            return


def event(content: BaseModel) -> bytes:
    return f"data: {content.model_dump_json(exclude_unset=True)}\n\n".encode()
