"""The routes of the server: an engine over HTTP, in the shape of OpenAI's API."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Annotated, Any, NamedTuple

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from jinja2 import TemplateError
from prometheus_client import generate_latest
from starlette.exceptions import HTTPException as StarletteHTTPException

from conflictscope.serve.engine import Engine
from conflictscope.serve.jobs import Done, Job, QueueFull
from conflictscope.serve.requests import AnswerRequest, ChatRequest, CompletionRequest, Message
from interp.errors import UserError
from interp.inputs import token_ids

_LARGEST_BODY = 2**20
_FAILED = "The answer could not be generated; the server's log says why."
_BEARER = HTTPBearer(auto_error=False)
_log = logging.getLogger(__name__)


def build_app(engine: Engine, *, api_key: str | None = None) -> FastAPI:
    """The HTTP side of an engine; when the app ends, so does the engine.

    Args:
        engine: What answers.
        api_key: What clients have to send as a bearer token; ``None`` asks for none. ``/health`` is open to all.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(engine.close)

    app = FastAPI(title="ConflictScope", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    def check_key(given: Annotated[HTTPAuthorizationCredentials | None, Depends(_BEARER)]) -> None:
        if api_key is not None and not (given and hmac.compare_digest(given.credentials.encode(), api_key.encode())):
            raise HTTPException(401, "The API key is missing or wrong; send it as a bearer token.")

    app.include_router(_routes(engine), dependencies=[Depends(check_key)])
    _check_and_count(app, engine)
    _explain_errors(app, engine)
    return app


def _routes(engine: Engine) -> APIRouter:
    """What needs the API key."""
    routes = APIRouter()

    @routes.get("/metrics")
    async def metrics() -> PlainTextResponse:
        return PlainTextResponse(generate_latest(engine.metrics.registry).decode())

    @routes.get("/v1/models")
    async def models() -> dict[str, Any]:
        listed = [{"id": name, "object": "model", "owned_by": "conflictscope"} for name in engine.models()]
        return {"object": "list", "data": listed}

    @routes.post("/v1/completions")
    async def completions(asked: CompletionRequest, request: Request) -> Any:
        texts = [asked.prompt] if asked.without_context is None else [asked.prompt, asked.without_context]
        return await _respond(engine, request, token_ids(engine.tokenizer, texts), asked, asked.max_tokens, _COMPLETION)

    @routes.post("/v1/chat/completions")
    async def chat(asked: ChatRequest, request: Request) -> Any:
        chats = [asked.messages] if asked.without_context is None else [asked.messages, asked.without_context]
        prompts = [_chat_tokens(engine, messages) for messages in chats]
        return await _respond(engine, request, prompts, asked, asked.longest, _CHAT)

    return routes


def _check_and_count(app: FastAPI, engine: Engine) -> None:
    """Refuse bodies that are too large or of unknown length; count requests by path and status."""

    @app.middleware("http")
    async def measure(request: Request, call_next: Any) -> Any:
        length = request.headers.get("content-length", "0" if request.method in ("GET", "HEAD") else "")
        if not length.isdecimal():
            response = _error(411, "The request does not say how long it is; send a Content-Length.")
        elif int(length) > _LARGEST_BODY:
            response = _error(413, f"The request has {length} bytes, but this server takes {_LARGEST_BODY} at most.")
        else:
            try:
                response = await call_next(request)
            except Exception:
                _log.exception("a request failed")
                response = _error(500, _FAILED)
        route = request.scope.get("route")
        engine.metrics.requests.labels(getattr(route, "path", "other"), response.status_code).inc()
        return response


def _explain_errors(app: FastAPI, engine: Engine) -> None:
    """Answer what cannot be done with a sentence, in the shape of OpenAI's errors."""

    @app.exception_handler(UserError)
    async def wrong(_: Request, error: UserError) -> JSONResponse:
        return _error(400, str(error))

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return _error(400, "The body is not valid JSON; send an object.")
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        return _error(400, f"{where or 'The body'}: {first['msg']}.")

    @app.exception_handler(QueueFull)
    async def full(_: Request, __: QueueFull) -> JSONResponse:
        response = _error(429, f"{engine.limits.waiting} requests wait already; try again later.")
        response.headers["Retry-After"] = "5"
        return response

    @app.exception_handler(StarletteHTTPException)
    async def refused(_: Request, error: StarletteHTTPException) -> JSONResponse:
        return _error(error.status_code, str(error.detail))


def _chat_tokens(engine: Engine, messages: Sequence[Message]) -> list[int]:
    """A chat as the model reads it."""
    if not engine.tokenizer.chat_template:
        raise UserError(f"{engine.name} has no chat template; use /v1/completions.")
    turns = [message.model_dump() for message in messages]
    try:
        text = engine.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise UserError(f"The chat template of {engine.name} refuses these messages: {error}.") from error
    return engine.tokenizer(text, add_special_tokens=False)["input_ids"]


class _Shape(NamedTuple):
    """How answers of an endpoint are written.

    Attributes:
        kind: The name of a whole answer.
        chunk: The name of a part of one.
        whole: A choice from the text.
        part: A choice from new text, which is ``None`` at the end.
    """

    kind: str
    chunk: str
    whole: Callable[[str], dict[str, Any]]
    part: Callable[[str | None], dict[str, Any]]


_COMPLETION = _Shape(
    "text_completion", "text_completion", lambda text: {"text": text}, lambda text: {"text": text or ""}
)
_CHAT = _Shape(
    "chat.completion",
    "chat.completion.chunk",
    lambda text: {"message": {"role": "assistant", "content": text}},
    lambda text: {"delta": {} if text is None else {"role": "assistant", "content": text}},
)


async def _respond(
    engine: Engine,
    request: Request,
    prompts: list[list[int]],
    asked: AnswerRequest,
    max_tokens: int | None,
    shape: _Shape,
) -> Any:
    """Answer a prompt, after which there may be the same without its context."""
    prompt, bare = prompts[0], prompts[1] if len(prompts) > 1 else None
    loop = asyncio.get_running_loop()
    events: asyncio.Queue[str | Done | Exception] = asyncio.Queue()

    def send(event: str | Done | Exception) -> None:
        # Where the server has stopped there is nobody left to tell.
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(events.put_nowait, event)

    job = engine.job(prompt, asked, max_tokens, send, bare=bare)
    engine.submit(job)
    about = {
        "id": job.id,
        "created": int(time.time()),
        "model": engine.name,
        "intervention": {"name": job.intervention, "trust": asked.trust, "strength": asked.strength},
    }

    def usage(done: Done) -> dict[str, int]:
        counts = {"prompt_tokens": len(prompt), "completion_tokens": done.tokens}
        return {**counts, "total_tokens": sum(counts.values())}

    if asked.stream:
        return StreamingResponse(_chunks(job, events, about, shape, usage), media_type="text/event-stream")
    try:
        while True:
            try:
                event = await asyncio.wait_for(events.get(), 0.5)
            except TimeoutError:
                if await request.is_disconnected():
                    return PlainTextResponse("", 499)
                continue
            if isinstance(event, Exception):
                return _error(500, _FAILED)
            if isinstance(event, Done):
                choice = {"index": 0, **shape.whole(event.text), "finish_reason": event.reason}
                return {**about, "object": shape.kind, "choices": [choice], "usage": usage(event)}
    finally:
        job.cancelled.set()


async def _chunks(
    job: Job, events: asyncio.Queue[Any], about: dict[str, Any], shape: _Shape, usage: Callable[[Done], dict[str, int]]
) -> AsyncIterator[str]:
    """Server-sent events: new text as it comes, the end with its reason, and ``[DONE]``."""

    def event(content: dict[str, Any]) -> str:
        return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"

    try:
        while True:
            found = await events.get()
            if isinstance(found, Exception):
                yield event(_error_record(500, _FAILED))
                return
            ends = isinstance(found, Done)
            choice = {
                "index": 0,
                **shape.part(None if ends else found),
                "finish_reason": found.reason if ends else None,
            }
            last = {"usage": usage(found)} if ends else {}
            yield event({**about, "object": shape.chunk, "choices": [choice], **last})
            if ends:
                yield "data: [DONE]\n\n"
                return
    finally:
        job.cancelled.set()


def _error_record(status: int, message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "server_error" if status >= 500 else "invalid_request_error"}}


def _error(status: int, message: str) -> JSONResponse:
    return JSONResponse(_error_record(status, message), status)
