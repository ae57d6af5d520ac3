"""Serve a model with interventions over HTTP, in the shape of OpenAI's API: each request chooses its own.

1. The model is loaded once, with transformers; every intervention file is checked against it at the start.
2. Requests wait in a bounded queue. One thread takes them in turn, attaches what the request chose, generates, and
   takes it off: every answer is what the model gives alone. (For throughput fold a setting into the weights and serve
   the checkpoint with a batching engine.)
3. Text is sent as it is generated, or as a whole. Who hangs up is not generated for. A stop answers what was accepted,
   for a minute.

transformers has a server of its own, but it serves whatever model a client names, loads and unloads at a client's wish,
and its parts are private; so this is FastAPI around transformers' ``generate``.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import os
import queue
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from jinja2 import TemplateError
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException as StarletteHTTPException
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from interp.errors import UserError
from interp.inputs import most_positions, token_ids
from interp.models import decode_plainly
from interventions.base import Patch, attach_patches
from interventions.config import InterventionFile

UNEDITED = "none"
"""The intervention that a request names to get the model as it is."""

_LARGEST_BODY = 2**20
_USUAL_TOKENS = 64
_FAILED = "The answer could not be generated; the server's log says why."
# Colder logits leave the range of float32.
_COLDEST = 0.01
_INCOMPLETE = "\ufffd"
_BEARER = HTTPBearer(auto_error=False)
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """What a request may ask for.

    Attributes:
        prompt_tokens: Longest prompt.
        new_tokens: Longest answer.
        waiting: How many requests may wait.
    """

    prompt_tokens: int = 2048
    new_tokens: int = 512
    waiting: int = 256


class _Asked(BaseModel):
    """What completions and chats have in common; fields that this server does not have are refused."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    model: Annotated[str, Field(max_length=1000)] | None = None
    intervention: Annotated[str, Field(max_length=200)] | None = None
    trust: Annotated[float, Field(ge=-1, le=1)] | None = None
    strength: Annotated[float, Field(ge=-100, le=100)] = 1.0
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=10)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stop: (
        Annotated[str, Field(min_length=1, max_length=100)]
        | Annotated[list[Annotated[str, Field(min_length=1, max_length=100)]], Field(max_length=4)]
        | None
    ) = None
    stream: bool = False
    n: Literal[1] = 1

    @property
    def stops(self) -> list[str]:
        """Texts that end the answer."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class CompletionRequest(_Asked):
    """The body of ``/v1/completions``."""

    prompt: str


class Message(BaseModel):
    """One turn of a chat."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "user", "assistant"]
    content: str


class ChatRequest(_Asked):
    """The body of ``/v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=1000)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None

    @property
    def longest(self) -> int | None:
        """What is asked under either name.

        Raises:
            UserError: If it is asked under both.
        """
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise UserError("max_tokens and max_completion_tokens mean the same; give one.")
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class Done(NamedTuple):
    """The end of an answer.

    Attributes:
        text: The whole answer.
        reason: ``stop`` (the model or a stop text ended it) or ``length``.
        tokens: How many tokens were generated.
    """

    text: str
    reason: Literal["stop", "length"]
    tokens: int


@dataclass(eq=False)
class Job:
    """A request on its way through the queue.

    Attributes:
        prompt: Token ids.
        asked: What was asked.
        intervention: The name of what is applied.
        send: Takes new text, the end, or an error; called in the generating thread.
        cancelled: Set by whoever no longer wants the answer.
    """

    prompt: list[int]
    asked: _Asked
    intervention: str
    send: Callable[[str | Done | Exception], None]
    max_tokens: int
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    cancelled: threading.Event = field(default_factory=threading.Event)


class QueueFull(Exception):
    """More requests wait than may."""


class Engine:
    """A model, its interventions, and the thread that answers.

    Args:
        model: The transformers model, in evaluation mode; it decodes plainly from now on.
        tokenizer: Its tokenizer.
        name: What the model is called.
        interventions: Files by name; the first is what a request gets that names none.
        limits: What requests may ask for.
        journal: File to which every answer is appended, and synced, before it is sent, of a stream its end; ``None``
            keeps none.

    Raises:
        UserError: If a file is for another model or tokenizer, or a name is taken.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        name: str,
        interventions: dict[str, InterventionFile],
        limits: Limits | None = None,
        journal: Path | None = None,
    ) -> None:
        if UNEDITED in interventions:
            raise UserError(
                f"An intervention cannot be called {UNEDITED}: that is the unedited model; rename the file."
            )
        for file in interventions.values():
            file.model.check(model, tokenizer)
        decode_plainly(model)
        self.model = model
        self.tokenizer = tokenizer
        self.name = name
        self.interventions = interventions
        self.limits = limits or Limits()
        self.metrics = _Metrics()
        self.patches = lru_cache(maxsize=8)(self._patches)
        self._journal = None if journal is None else _Journal(journal)
        self._jobs: queue.Queue[Job | None] = queue.Queue(self.limits.waiting)
        self._thread = threading.Thread(target=self._work, name="conflictscope-generate", daemon=True)
        self._thread.start()

    @property
    def default(self) -> str:
        """The intervention of a request that names none."""
        return next(iter(self.interventions), UNEDITED)

    @property
    def longest(self) -> int:
        """How many tokens prompt and answer may have together."""
        return most_positions(self.model) or 2**62

    def job(self, prompt: list[int], asked: _Asked, max_tokens: int | None, send: Callable[..., None]) -> Job:
        """A job for a request, or what is wrong with it; without ``max_tokens`` an answer has 64 at most.

        Raises:
            UserError: If it names another model or intervention, sets what that does not have, or is too long.
        """
        intervention = self._chosen(asked)
        max_tokens = min(_USUAL_TOKENS, self.limits.new_tokens) if max_tokens is None else max_tokens
        if not prompt:
            raise UserError("The prompt has no tokens; give some text.")
        if len(prompt) > self.limits.prompt_tokens:
            raise UserError(
                f"The prompt has {len(prompt)} tokens, but this server takes {self.limits.prompt_tokens} at most."
            )
        if max_tokens > self.limits.new_tokens:
            raise UserError(f"max_tokens is {max_tokens}, but this server gives {self.limits.new_tokens} at most.")
        if len(prompt) + max_tokens > self.longest:
            raise UserError(
                f"The prompt's {len(prompt)} tokens and {max_tokens} new ones are more than the {self.longest} that "
                "the model can take; ask for fewer."
            )
        self.patches(intervention, asked.trust, asked.strength)
        return Job(prompt, asked, intervention, send, max_tokens)

    def submit(self, job: Job) -> None:
        """Put a job into the queue.

        Raises:
            QueueFull: If too many wait already.
        """
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            raise QueueFull from None
        self.metrics.waiting.set(self._jobs.qsize())

    def close(self) -> None:
        """Answer what waits, then end; calling it again does nothing."""
        if self._thread.is_alive():
            self._jobs.put(None)
            self._thread.join()
        if self._journal is not None:
            self._journal.close()

    def _chosen(self, asked: _Asked) -> str:
        base, _, suffix = (asked.model or self.name).partition(":") if asked.model != self.name else (self.name, "", "")
        if base != self.name:
            raise UserError(f"This server has no model {asked.model!r}; it has {', '.join(self.models())}.")
        if suffix and asked.intervention is not None and asked.intervention != suffix:
            raise UserError(f"model names the intervention {suffix!r}, intervention {asked.intervention!r}; name one.")
        chosen = suffix or asked.intervention or self.default
        if chosen != UNEDITED and chosen not in self.interventions:
            raise UserError(
                f"There is no intervention {chosen!r}; there are {', '.join([UNEDITED, *self.interventions])}."
            )
        return chosen

    def models(self) -> list[str]:
        """What a request may name as its model: with the default intervention, with each, and unedited."""
        return [self.name, *(f"{self.name}:{name}" for name in (UNEDITED, *self.interventions))]

    def _patches(self, intervention: str, trust: float | None, strength: float) -> Sequence[Patch] | None:
        if intervention == UNEDITED:
            if trust is not None or strength != 1:
                raise UserError("The unedited model has no trust and no strength; name an intervention.")
            return None
        chosen = self.interventions[intervention].at(trust=trust, strength=strength)
        return [patch for part in chosen.build() for patch in part.patches(self.model)]

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            self.metrics.waiting.set(self._jobs.qsize())
            if job.cancelled.is_set():
                continue
            started = time.perf_counter()
            try:
                done = self._answer(job)
                if self._journal is not None and not job.cancelled.is_set():
                    self._journal.append(job, done)
                self.metrics.tokens.labels(job.intervention).inc(done.tokens)
                job.send(done)
            except Exception as error:
                _log.exception("request %s failed", job.id)
                job.send(error)
            finally:
                self.metrics.seconds.observe(time.perf_counter() - started)

    def _answer(self, job: Job) -> Done:
        asked = job.asked
        device = self.model.get_input_embeddings().weight.device
        ids = torch.tensor([job.prompt], device=device)
        streamer = _Streamer(self.tokenizer, asked.stops, job)
        sampling: dict[str, Any] = {"do_sample": False}
        if asked.temperature >= _COLDEST:
            sampling = {"do_sample": True, "temperature": asked.temperature, "top_p": asked.top_p, "top_k": 0}
            torch.manual_seed(int.from_bytes(os.urandom(8), "big") >> 1 if asked.seed is None else asked.seed)
        patches = self.patches(job.intervention, asked.trust, asked.strength)
        with attach_patches(self.model, patches or []), torch.inference_mode():
            self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=job.max_tokens,
                streamer=streamer,
                stopping_criteria=StoppingCriteriaList([streamer.stopping]),
                **sampling,
            )
        own = self.model.generation_config
        ends = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
        return streamer.done(job.max_tokens, ends)


class _Streamer(BaseStreamer):
    """Sends text as soon as it is certain: no half characters, nothing that may turn out to be a stop text."""

    def __init__(self, tokenizer: Any, stops: Sequence[str], job: Job) -> None:
        self._tokenizer = tokenizer
        self._stops = stops
        self._job = job
        self._ids: list[int] = []
        self._sent = ""
        self._prompt_seen = False
        self._stopped = False
        self.stopping = _Stopping(lambda: self._stopped or job.cancelled.is_set())

    def put(self, value: Any) -> None:
        """Take the prompt, then token after token."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        self._ids += value.flatten().tolist()
        text, self._stopped = self._text()
        longest = max(map(len, self._stops), default=1) - 1
        certain = text if self._stopped else text.rstrip(_INCOMPLETE)
        certain = certain if self._stopped or not longest else certain[:-longest]
        self._send(certain)

    def end(self) -> None:
        """The rest is sent by ``done``."""

    def done(self, max_tokens: int, end_tokens: Sequence[int | None]) -> Done:
        """Send what is left, and say how the answer ended."""
        text, stopped = self._text()
        self._send(text)
        ended = stopped or len(self._ids) < max_tokens or self._ids[-1] in end_tokens
        return Done(text, "stop" if ended else "length", len(self._ids))

    def _text(self) -> tuple[str, bool]:
        text = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        found = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        return (text[: min(found)], True) if found else (text, False)

    def _send(self, text: str) -> None:
        if len(text) > len(self._sent) and text.startswith(self._sent):
            self._job.send(text[len(self._sent) :])
            self._sent = text


class _Stopping(StoppingCriteria):
    def __init__(self, stopped: Callable[[], bool]) -> None:
        self._stopped = stopped

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:  # noqa: ARG002 (transformers' signature)
        return torch.full((len(input_ids),), self._stopped(), device=input_ids.device)


class _Journal:
    """Answers in a file, one JSON object a line, on the disk before they are sent."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._stream = path.open("a+b")
        self._stream.seek(0, os.SEEK_END)
        if end := self._stream.tell():
            self._stream.seek(end - 1)
            if self._stream.read(1) != b"\n":
                # A line that was being written when the server was killed; nobody got that answer.
                self._stream.write(b"\n")

    def append(self, job: Job, done: Done) -> None:
        record = {
            "id": job.id,
            "time": time.time(),
            "intervention": job.intervention,
            "request": job.asked.model_dump(exclude_unset=True),
            "answer": done.text,
        }
        self._stream.write(json.dumps(record, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def close(self) -> None:
        self._stream.close()


class _Metrics:
    """What ``/metrics`` shows."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        about: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("conflictscope_requests", "Requests by status", ["path", "status"], **about)
        self.tokens = Counter("conflictscope_generated_tokens", "Tokens by intervention", ["intervention"], **about)
        self.waiting = Gauge("conflictscope_waiting_requests", "Requests that wait", **about)
        self.seconds = Histogram("conflictscope_generation_seconds", "Seconds of an answer, without waiting", **about)


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

    def check_key(given: Annotated[HTTPAuthorizationCredentials | None, Depends(_BEARER)]) -> None:
        if api_key is not None and not (given and hmac.compare_digest(given.credentials.encode(), api_key.encode())):
            raise HTTPException(401, "The API key is missing or wrong; send it as a bearer token.")

    guarded = [Depends(check_key)]

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

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics", dependencies=guarded)
    async def metrics() -> PlainTextResponse:
        return PlainTextResponse(generate_latest(engine.metrics.registry).decode())

    @app.get("/v1/models", dependencies=guarded)
    async def models() -> dict[str, Any]:
        listed = [{"id": name, "object": "model", "owned_by": "conflictscope"} for name in engine.models()]
        return {"object": "list", "data": listed}

    @app.post("/v1/completions", dependencies=guarded)
    async def completions(asked: CompletionRequest, request: Request) -> Any:
        (prompt,) = token_ids(engine.tokenizer, [asked.prompt])
        return await _respond(engine, request, prompt, asked, asked.max_tokens, _COMPLETION)

    @app.post("/v1/chat/completions", dependencies=guarded)
    async def chat(asked: ChatRequest, request: Request) -> Any:
        if not engine.tokenizer.chat_template:
            raise UserError(f"{engine.name} has no chat template; use /v1/completions.")
        messages = [message.model_dump() for message in asked.messages]
        try:
            text = engine.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise UserError(f"The chat template of {engine.name} refuses these messages: {error}.") from error
        prompt = engine.tokenizer(text, add_special_tokens=False)["input_ids"]
        return await _respond(engine, request, prompt, asked, asked.longest, _CHAT)

    return app


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
    engine: Engine, request: Request, prompt: list[int], asked: _Asked, max_tokens: int | None, shape: _Shape
) -> Any:
    loop = asyncio.get_running_loop()
    events: asyncio.Queue[str | Done | Exception] = asyncio.Queue()

    def send(event: str | Done | Exception) -> None:
        # Where the server has stopped there is nobody left to tell.
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(events.put_nowait, event)

    job = engine.job(prompt, asked, max_tokens, send)
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
