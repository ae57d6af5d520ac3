"""The routes of the server: an engine over HTTP, in the shape of OpenAI's API."""

from __future__ import annotations

import asyncio
import hmac
import inspect
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
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
from conflictscope.serve.jobs import Done, Event, Job, QueueFull
from conflictscope.serve.requests import AnswerRequest, ChatRequest, CompletionRequest, Message
from conflictscope.serve.shapes import ChatShape, CompletionShape, Shape
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

    about = {"object": "model", "created": int(time.time()), "owned_by": "conflictscope"}

    @routes.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": name, **about} for name in engine.models()]}

    # Names may be paths.
    @routes.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        if name not in engine.models():
            raise HTTPException(404, f"There is no model {name[:200]!r}; GET /v1/models lists what there is.")
        return {"id": name, **about}

    @routes.post("/v1/completions")
    async def completions(asked: CompletionRequest, request: Request) -> Any:
        def read() -> _Prompts:
            bare = None if asked.without_context is None else _tokens(engine, asked.without_context)
            return _Prompts(_tokens(engine, asked.prompt), bare)

        return await _respond(engine, request, asked, read, CompletionShape)

    @routes.post("/v1/chat/completions")
    async def chat(asked: ChatRequest, request: Request) -> Any:
        def read() -> _Prompts:
            options = asked.chat_template_kwargs
            without = asked.without_context
            bare = None if without is None else [_chat_tokens(engine, without, options)]
            return _Prompts([_chat_tokens(engine, asked.messages, options)], bare)

        return await _respond(engine, request, asked, read, ChatShape)

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
        return _error(400, f"{where or 'The body'}: {first['msg'].removeprefix('Value error, ')}.")

    @app.exception_handler(QueueFull)
    async def full(_: Request, __: QueueFull) -> JSONResponse:
        response = _error(429, f"{engine.limits.waiting} requests wait already; try again later.")
        response.headers["Retry-After"] = "5"
        return response

    @app.exception_handler(StarletteHTTPException)
    async def refused(_: Request, error: StarletteHTTPException) -> JSONResponse:
        return _error(error.status_code, str(error.detail))


class _Prompts(NamedTuple):
    """Token ids of a request's prompts, and of the same without their contexts, if they are given."""

    prompts: list[list[int]]
    bare: list[list[int]] | None


def _tokens(engine: Engine, prompt: Any) -> list[list[int]]:
    """The token ids of each prompt of a request: one or several, as texts or as ids."""
    if isinstance(prompt, str):
        return token_ids(engine.tokenizer, [prompt])
    if isinstance(prompt[0], str):
        return token_ids(engine.tokenizer, prompt)
    return [prompt] if isinstance(prompt[0], int) else prompt


def _chat_tokens(engine: Engine, messages: Sequence[Message], options: Mapping[str, Any]) -> list[int]:
    """A chat as the model reads it."""
    if not engine.tokenizer.chat_template:
        raise UserError(f"{engine.name} has no chat template; use /v1/completions.")
    write = engine.tokenizer.apply_chat_template
    if taken := sorted(options.keys() & inspect.signature(write).parameters.keys()):
        raise UserError(f"chat_template_kwargs sets what templates use, not {taken[0]}; leave it out.")
    turns = [message.model_dump(exclude_none=True) for message in messages]
    try:
        text = write(turns, tokenize=False, add_generation_prompt=True, **options)
    except (TemplateError, TypeError) as error:
        raise UserError(f"The chat template of {engine.name} refuses these messages: {error}.") from error
    return engine.tokenizer(text, add_special_tokens=False)["input_ids"]


_Events = asyncio.Queue[tuple[int, Event]]


async def _respond(
    engine: Engine, request: Request, asked: AnswerRequest, read: Callable[[], _Prompts], kind: type[Shape]
) -> Any:
    """Answer a request, whose prompts ``read`` gives."""
    shape = kind(engine.tokenizer, scored=asked.n_scores is not None)
    loop = asyncio.get_running_loop()
    events: _Events = asyncio.Queue()

    def send(index: int, event: Event) -> None:
        # Where the server has stopped there is nobody left to tell.
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(events.put_nowait, (index, event))

    def prepare() -> tuple[_Prompts, list[Job]]:
        prompts = read()
        return prompts, engine.jobs(prompts.prompts, asked, send, bare=prompts.bare)

    # Others' text goes on while a long prompt becomes tokens.
    prompts, jobs = await asyncio.to_thread(prepare)
    engine.submit(jobs)
    answering = _Answering(
        jobs=jobs,
        events=events,
        about={
            "id": jobs[0].id,
            "created": int(time.time()),
            "model": engine.name,
            "intervention": {"name": jobs[0].intervention, "trust": asked.trust, "strength": asked.strength},
        },
        shape=shape,
        copies=asked.n * len(prompts.prompts) // len(jobs),
        prompt_tokens=sum(map(len, prompts.prompts)),
    )
    if asked.stream:
        chunks = answering.chunks(with_usage=asked.stream_options.include_usage)
        return StreamingResponse(chunks, media_type="text/event-stream")
    return await answering.whole(request)


class _Answering(NamedTuple):
    """A request that is being answered.

    Attributes:
        jobs: Its answers.
        events: What becomes of them, with their numbers.
        about: What all parts of the response say.
        shape: How they are written.
        copies: How many choices of the response each answer is.
        prompt_tokens: Of all prompts.
    """

    jobs: list[Job]
    events: _Events
    about: dict[str, Any]
    shape: Shape
    copies: int
    prompt_tokens: int

    async def whole(self, request: Request) -> Any:
        """All choices at once."""
        ended: dict[int, Done] = {}
        try:
            while len(ended) < len(self.jobs):
                try:
                    index, event = await asyncio.wait_for(self.events.get(), 0.5)
                except TimeoutError:
                    if await request.is_disconnected():
                        return PlainTextResponse("", 499)
                    continue
                if isinstance(event, Exception):
                    return _error(500, _FAILED)
                if isinstance(event, Done):
                    ended[index] = event
        finally:
            self.cancel()
        choices = [self.shape.whole(choice, ended[index]) for index in sorted(ended) for choice in self._choices(index)]
        usage = self._usage(ended.values())
        return JSONResponse({**self.about, "object": self.shape.kind, "choices": choices, "usage": usage})

    async def chunks(self, *, with_usage: bool) -> AsyncIterator[str]:
        """Server-sent events: new text as it comes, ends with their reasons, what was used if asked, and ``[DONE]``."""
        about = {**self.about, "object": self.shape.chunk}
        usage: dict[str, Any] = {"usage": None} if with_usage else {}
        ended: list[Done] = []
        try:
            while len(ended) < len(self.jobs):
                index, event = await self.events.get()
                if isinstance(event, Exception):
                    yield _event(_error_record(500, _FAILED))
                    return
                piece, reason = (None, event.reason) if isinstance(event, Done) else (event, None)
                for choice in self._choices(index):
                    yield _event({**about, "choices": [self.shape.part(choice, piece, reason)], **usage})
                if isinstance(event, Done):
                    ended.append(event)
            if with_usage:
                yield _event({**about, "choices": [], "usage": self._usage(ended)})
            yield "data: [DONE]\n\n"
        finally:
            self.cancel()

    def cancel(self) -> None:
        """Say that nobody waits for what is not answered yet."""
        for job in self.jobs:
            job.cancelled.set()

    def _choices(self, index: int) -> range:
        return range(index * self.copies, (index + 1) * self.copies)

    def _usage(self, ended: Iterable[Done]) -> dict[str, int]:
        counts = {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.copies * sum(done.tokens for done in ended),
        }
        return {**counts, "total_tokens": sum(counts.values())}


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def _error_record(status: int, message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "server_error" if status >= 500 else "invalid_request_error"}}


def _error(status: int, message: str) -> JSONResponse:
    return JSONResponse(_error_record(status, message), status)
