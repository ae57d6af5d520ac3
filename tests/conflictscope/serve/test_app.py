import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from fastapi.testclient import TestClient

from conflictscope.serve.app import build_app
from conflictscope.serve.engine import Engine
from conflictscope.serve.jobs import Done
from conflictscope.serve.requests import CompletionRequest, Limits
from interp.errors import UserError
from interp.generation import greedy_texts
from interp.models import load_checkpoint
from interventions.base import applied
from interventions.config import InterventionFile, named
from interventions.decoding import CAD
from interventions.dial import DialScale, TrustDial
from interventions.gate import ConflictGate
from interventions.heads import HeadScaling
from interventions.identity import ModelIdentity
from interventions.runtime import apply
from interventions.steering import Steering
from tests.tiny import tiny_conflicts

PROMPTS = [e.prompt for e in tiny_conflicts()]
VECTOR = 3 * torch.randn(32, generator=torch.Generator().manual_seed(0))
HEADS = HeadScaling.of([(1, 1), (2, 3)], -2.0)
KINDS: dict[str, list[Any]] = {
    "heads": [HEADS],
    "steering": [Steering(1, VECTOR)],
    "gate": [ConflictGate("block", 0, VECTOR, 0.0, 0.0, (HEADS,))],
    "dial": [TrustDial((DialScale(1, 1, -1.0, 3.0), DialScale(2, 2, 2.0, -2.0)))],
}
PAIR = (PROMPTS[0], tiny_conflicts().examples[0].bare_prompt)
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


@pytest.fixture(scope="module")
def files(tiny_directories, tmp_path_factory) -> list[Path]:
    """An intervention file of every kind, for the tiny Llama."""
    folder = tmp_path_factory.mktemp("files")
    model, tokenizer = load_checkpoint(str(tiny_directories["llama"]))
    identity = ModelIdentity.of(model, str(tiny_directories["llama"]), tokenizer)
    for name, parts in KINDS.items():
        InterventionFile.of(parts, name=name, model=identity).save(folder / f"{name}.json")
    return [folder / f"{name}.json" for name in KINDS]


def engine_of(folder: Path, files: list[Path], **options: Any) -> Engine:
    model, tokenizer = load_checkpoint(str(folder))
    tokenizer.chat_template = TEMPLATE
    return Engine(model.eval(), tokenizer, name="tiny", interventions=named(files), **options)


@pytest.fixture(scope="module")
def client(tiny_directories, files):
    with TestClient(build_app(engine_of(tiny_directories["llama"], files))) as client:
        yield client


@pytest.fixture(scope="module")
def answer(tiny_directories, files):
    """What a prompt gets outside of any server."""
    model, tokenizer = load_checkpoint(str(tiny_directories["llama"]))
    by_name = {path.stem: path for path in files}

    def alone(prompt: str, intervention: str, trust: float | None = None, tokens: int = 6) -> str:
        if intervention == "none":
            return greedy_texts(model, tokenizer, [prompt], max_new_tokens=tokens)[0]
        with apply(model, by_name[intervention], trust=trust):
            return greedy_texts(model, tokenizer, [prompt], max_new_tokens=tokens)[0]

    return alone


def completion(client, prompt: str, **asked: Any) -> dict[str, Any]:
    response = client.post("/v1/completions", json={"prompt": prompt, "max_tokens": 6, **asked})
    assert response.status_code == 200, response.text
    return response.json()


def streamed(response) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


# What is answered


@pytest.fixture(scope="module")
def weighing(tiny_directories, tmp_path_factory):
    """A server of a rule for the next token, and the model that it has."""
    model, tokenizer = load_checkpoint(str(tiny_directories["llama"]))
    tokenizer.chat_template = TEMPLATE
    place = tmp_path_factory.mktemp("rules") / "cad.json"
    InterventionFile.of([HEADS, CAD(1.0)], name="cad", model=ModelIdentity.of(model, "tiny", tokenizer)).save(place)
    with TestClient(build_app(engine_of(tiny_directories["llama"], [place]))) as client:
        yield client, model.eval(), tokenizer


def weighed_by_hand(model, pair, n_tokens: int, temperature: float = 0.0, seed: int = 0) -> list[int]:
    """What CAD with an alpha of 1 goes on with, by passes over whole texts and the formula."""
    written, random = pair[0][:, :0], torch.Generator().manual_seed(seed)
    with applied(model, HEADS), torch.inference_mode():
        for _ in range(n_tokens):
            first, second = (model(input_ids=torch.cat([ids, written], 1)).logits[:, -1] for ids in pair)
            scores = 2 * first - second
            token = scores.argmax(-1, keepdim=True)
            if temperature:
                token = torch.multinomial((scores / temperature).softmax(-1), 1, generator=random)
            written = torch.cat([written, token], 1)
    return written[0].tolist()


@pytest.mark.parametrize("chat", [False, True], ids=["completion", "chat"])
@pytest.mark.parametrize("asked", [{}, {"temperature": 0.8, "seed": 5}], ids=["greedy", "sampled"])
def test_a_rule_weighs_a_request_s_prompt_against_the_same_without_its_context(weighing, chat, asked):
    client, model, tokenizer = weighing
    texts = PAIR
    body: dict[str, Any] = {"prompt": texts[0], "without_context": texts[1], "max_tokens": 8, **asked}
    if chat:
        turns = [[{"role": "user", "content": text}] for text in texts]
        texts = [tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) for turn in turns]
        body |= {"messages": turns[0], "without_context": turns[1]}
        del body["prompt"]
    path = "/v1/chat/completions" if chat else "/v1/completions"
    ids = [tokenizer(text, return_tensors="pt")["input_ids"] for text in texts]
    expected = tokenizer.decode(weighed_by_hand(model, ids, 8, **asked), skip_special_tokens=True)
    (choice,) = client.post(path, json=body).json()["choices"]
    assert (choice["message"]["content"] if chat else choice["text"]) == expected
    parts = streamed(client.post(path, json={**body, "stream": True}))
    said = [part["choices"][0]["delta"].get("content", "") if chat else part["choices"][0]["text"] for part in parts]
    assert "".join(said) == expected


def test_a_rule_needs_the_prompt_without_its_context_and_nothing_else_does(weighing, client):
    rules = weighing[0]
    for client_, asked, message in (
        (rules, {"prompt": PAIR[0]}, "give that as without_context"),
        (
            rules,
            {"prompt": PAIR[1], "without_context": PAIR[1]},
            "or ask a prompt that has none",
        ),
        (rules, {"prompt": PAIR[0], "without_context": ""}, "no tokens"),
        (rules, {"prompt": PAIR[0], "without_context": PAIR[1], "intervention": "none"}, "none asks the prompt alone"),
        (client, {"prompt": PAIR[0], "without_context": PAIR[1]}, "heads asks the prompt alone"),
    ):
        response = client_.post("/v1/completions", json=asked)
        assert response.status_code == 400
        assert message in response.json()["error"]["message"]


@pytest.mark.parametrize("intervention", ["none", "heads", "steering", "gate"])
def test_an_answer_is_what_the_model_says_with_the_chosen_intervention(client, answer, intervention):
    for prompt in PROMPTS[:4]:
        found = completion(client, prompt, intervention=intervention)
        assert found["choices"][0]["text"] == answer(prompt, intervention)
        assert found["intervention"]["name"] == intervention
        assert found["usage"]["completion_tokens"] == 6
        assert found["choices"][0]["finish_reason"] == "length"


def test_the_first_file_is_the_default_and_the_model_field_chooses_too(client, answer):
    expected = answer(PROMPTS[0], "heads")
    assert completion(client, PROMPTS[0])["choices"][0]["text"] == expected
    assert completion(client, PROMPTS[0], model="tiny:heads")["choices"][0]["text"] == expected
    assert completion(client, PROMPTS[0], model="tiny:none")["choices"][0]["text"] == answer(PROMPTS[0], "none")


def test_trust_and_strength_are_chosen_for_each_request(client, answer):
    for trust in (-1.0, 0.0, 0.5):
        found = completion(client, PROMPTS[1], intervention="dial", trust=trust)
        assert found["choices"][0]["text"] == answer(PROMPTS[1], "dial", trust)
    nothing = completion(client, PROMPTS[1], intervention="heads", strength=0)
    assert nothing["choices"][0]["text"] == answer(PROMPTS[1], "none")


def test_a_stream_adds_up_to_the_whole_answer(client):
    for prompt in PROMPTS[:4]:
        whole = completion(client, prompt, max_tokens=20)
        asked = {"prompt": prompt, "max_tokens": 20, "stream": True}
        parts = streamed(client.post("/v1/completions", json=asked))
        assert "".join(part["choices"][0]["text"] for part in parts) == whole["choices"][0]["text"]
        assert parts[-1]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
        assert len(parts) > 2


def test_a_chat_is_put_through_the_template(client, answer):
    messages = [{"role": "user", "content": PROMPTS[0]}]
    expected = answer(f"user: {PROMPTS[0]}\nassistant:", "heads")
    found = client.post("/v1/chat/completions", json={"messages": messages, "max_completion_tokens": 6}).json()
    assert found["choices"][0]["message"] == {"role": "assistant", "content": expected}
    parts = streamed(client.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 6, "stream": True}))
    assert "".join(part["choices"][0]["delta"].get("content", "") for part in parts) == expected


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_text_ends_the_answer_and_is_not_part_of_it(client, stream):
    whole = completion(client, PROMPTS[0], max_tokens=20)["choices"][0]["text"]
    # A stop text that begins in one token and ends in another.
    stop = whole[5:9]
    expected = whole[: whole.index(stop)]
    asked = {"prompt": PROMPTS[0], "max_tokens": 20, "stop": ["nowhere to be found", stop], "stream": stream}
    response = client.post("/v1/completions", json=asked)
    if stream:
        parts = streamed(response)
        assert "".join(part["choices"][0]["text"] for part in parts) == expected
        assert parts[-1]["choices"][0]["finish_reason"] == "stop"
    else:
        choice = {"index": 0, "text": expected, "logprobs": None, "finish_reason": "stop"}
        assert response.json()["choices"][0] == choice


def test_sampling_repeats_itself_with_a_seed_only(client):
    asked = {"temperature": 2.0, "max_tokens": 20}
    same = {completion(client, PROMPTS[0], seed=5, **asked)["choices"][0]["text"] for _ in range(3)}
    others = {completion(client, PROMPTS[0], **asked)["choices"][0]["text"] for _ in range(3)}
    assert len(same) == 1
    assert len(others) == 3


def test_two_hundred_requests_at_once_get_what_each_gets_alone(tiny_directories, files, answer):
    choices = ["none", "heads", "steering", "gate", "dial"]
    asked = [
        {"prompt": PROMPTS[i % len(PROMPTS)], "max_tokens": 6, "stream": i % 3 == 0, "intervention": choices[i % 5]}
        | ({"trust": (-1.0, 1.0)[i % 2]} if choices[i % 5] == "dial" else {})
        for i in range(200)
    ]
    expected = [answer(a["prompt"], a["intervention"], a.get("trust")) for a in asked]
    app = build_app(engine_of(tiny_directories["llama"], files))

    async def all_at_once() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://tiny", timeout=120) as http:
            return list(await asyncio.gather(*(http.post("/v1/completions", json=each) for each in asked)))

    for each, wanted, response in zip(asked, expected, asyncio.run(all_at_once()), strict=True):
        assert response.status_code == 200
        parts = streamed(response) if each["stream"] else [response.json()]
        assert "".join(part["choices"][0]["text"] for part in parts) == wanted


# What is refused


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({}, "prompt: Field required"),
        ({"prompt": 3}, "prompt: give a text, a list of texts"),
        ({"prompt": [1, "a"]}, "prompt: give a text, a list of texts"),
        ({"prompt": [10**6]}, "the model knows those below"),
        ({"prompt": ["a"] * 64, "n": 16, "temperature": 1}, "asks for 1024 answers, but this server lets 256 wait"),
        ({"prompt": ""}, "The prompt has no tokens"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "max_tokens": 513}, "max_tokens is 513, but this server gives 512 at most"),
        ({"prompt": "a", "temperature": -1}, "temperature"),
        ({"prompt": "a", "stop": ["a"] * 5}, "stop"),
        ({"prompt": "a", "n": 17}, "n: Input should be less than or equal to 16"),
        ({"prompt": "a", "logprobs": 21}, "logprobs: Input should be less than or equal to 20"),
        ({"prompt": "a", "top_k": 3}, "top_k: Extra inputs are not permitted"),
        ({"prompt": "a", "frequency_penalty": 0.5}, "frequency_penalty: this server has nothing but 0 here"),
        ({"prompt": "a", "presence_penalty": -1}, "presence_penalty: this server has nothing but 0 here"),
        ({"prompt": "a", "logit_bias": {"1": 100}}, "logit_bias: this server has nothing but {} here"),
        ({"prompt": "a", "response_format": {"type": "json_object"}}, "response_format.type: Input should be 'text'"),
        ({"prompt": "a", "echo": True}, "echo: this server has nothing but False here"),
        ({"prompt": "a", "best_of": 2}, "best_of: this server has nothing but 1 here"),
        ({"prompt": "a", "suffix": "b"}, "suffix: this server has nothing but '' here"),
        ({"prompt": "a", "intervention": "lobotomy"}, "no intervention 'lobotomy'; there are none, heads"),
        ({"prompt": "a", "model": "gpt-4"}, "no model 'gpt-4'; it has tiny, tiny:none"),
        ({"prompt": "a", "model": "tiny:heads", "intervention": "gate"}, "name one"),
        ({"prompt": "a", "intervention": "heads", "trust": 0.5}, "holds no trust dials"),
        ({"prompt": "a", "intervention": "dial", "trust": 2}, "trust"),
        ({"prompt": "a", "intervention": "dial", "strength": 2}, "A dial has no strength; set its trust"),
        ({"prompt": "a", "intervention": "none", "strength": 2}, "no trust and no strength"),
        ({"prompt": "word " * 3000}, "this server takes 2048 at most"),
    ],
)
def test_a_request_that_cannot_be_served_gets_a_sentence(client, body, sentence):
    response = client.post("/v1/completions", json=body)
    assert response.status_code == 400
    assert sentence in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("content", "headers", "status"),
    [
        (b"{", {}, 400),
        (b"[]", {}, 400),
        (b"\xff\xfe", {}, 400),
        (b'{"prompt": "' + b"a" * 2**20 + b'"}', {}, 413),
    ],
)
def test_a_body_that_is_none_is_refused(client, content, headers, status):
    response = client.post("/v1/completions", content=content, headers={"content-type": "application/json", **headers})
    assert response.status_code == status
    assert response.json()["error"]["message"]


def test_a_body_of_unknown_length_is_refused(client):
    response = client.post("/v1/completions", content=iter([b"{}"]), headers={"content-type": "application/json"})
    assert response.status_code == 411


def test_a_prompt_and_answer_longer_than_the_model_are_refused(tiny_directories, files, tmp_path):
    with TestClient(build_app(engine_of(tiny_directories["gpt2"], []))) as client:
        response = client.post("/v1/completions", json={"prompt": "a b c", "max_tokens": 100})
        assert "more than the 64 that the model can take" in response.json()["error"]["message"]


def test_without_the_key_only_health_is_open(tiny_directories, files):
    app = build_app(engine_of(tiny_directories["llama"], files), api_key="secret")
    with TestClient(app) as client:
        assert client.get("/health").json() == {"status": "ok"}
        assert client.get("/openapi.json").status_code == 404
        for path in ("/v1/models", "/metrics"):
            assert client.get(path).status_code == 401
            assert client.get(path, headers={"Authorization": "Bearer wrong"}).status_code == 401
            assert client.get(path, headers={"Authorization": "Bearer secret"}).status_code == 200
        assert client.post("/v1/completions", json={"prompt": PROMPTS[0]}).status_code == 401


def test_a_chat_that_cannot_be_written_is_refused(tiny_directories, files):
    engine = engine_of(tiny_directories["llama"], files)
    engine.tokenizer.chat_template = "{{ raise_exception('no system role here') }}"
    with TestClient(build_app(engine)) as client:
        body: dict[str, Any] = {"messages": [{"role": "system", "content": "a"}]}
        found = client.post("/v1/chat/completions", json=body)
        assert found.status_code == 400
        assert "refuses these messages: no system role here" in found.json()["error"]["message"]
        engine.tokenizer.chat_template = TEMPLATE
        found = client.post("/v1/chat/completions", json=body | {"max_tokens": 1, "max_completion_tokens": 2})
        assert "mean the same; give one" in found.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_failure_while_generating_is_said_and_does_not_stop_the_server(tiny_directories, files, stream, monkeypatch):
    engine = engine_of(tiny_directories["llama"], files)
    with TestClient(build_app(engine)) as client:
        with monkeypatch.context() as patch:
            patch.setattr(engine.model, "forward", lambda **_: 1 / 0)
            found = client.post("/v1/completions", json={"prompt": "a", "stream": stream})
            assert "the server's log says why" in found.text
            assert stream or found.status_code == 500
        assert completion(client, PROMPTS[0])["choices"][0]["text"]


def test_very_low_temperatures_are_greedy(client, answer):
    found = completion(client, PROMPTS[0], temperature=1e-40)
    assert found["choices"][0]["text"] == answer(PROMPTS[0], "heads")


def test_a_full_queue_is_refused_and_said_in_the_metrics(tiny_directories, files):
    engine = engine_of(tiny_directories["llama"], files, limits=Limits(waiting=1, rows=1))
    app = build_app(engine)

    async def many() -> list[int]:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://tiny", timeout=60) as http:
            body = {"prompt": PROMPTS[0], "max_tokens": 60}
            responses = await asyncio.gather(*(http.post("/v1/completions", json=body) for _ in range(12)))
            refused = [response for response in responses if response.status_code == 429]
            assert all(response.headers["Retry-After"] for response in refused)
            assert "1 requests wait already" in refused[0].json()["error"]["message"]
            metrics = (await http.get("/metrics")).text
            assert f'conflictscope_requests_total{{path="/v1/completions",status="429"}} {len(refused)}.0' in metrics
            return [response.status_code for response in responses]

    found = asyncio.run(many())
    assert set(found) == {200, 429}


def test_files_for_another_model_or_with_a_taken_name_are_refused(tiny_directories, files, tmp_path):
    with pytest.raises(UserError, match="architecture LlamaForCausalLM"):
        engine_of(tiny_directories["mistral"], files)
    (tmp_path / "heads.json").write_bytes(files[0].read_bytes())
    with pytest.raises(UserError, match="Two interventions are called heads"):
        named([files[0], tmp_path / "heads.json"])
    (tmp_path / "none.json").write_bytes(files[0].read_bytes())
    with pytest.raises(UserError, match="cannot be called none: that is the unedited model"):
        engine_of(tiny_directories["llama"], [tmp_path / "none.json"])


# Starting and stopping


def started(files: list[Path], journal: Path) -> tuple[subprocess.Popen[str], str]:
    """A server as a process, and its address."""
    command = [sys.executable, "-m", "conflictscope.cli", "serve", *map(str, files), "--port", "0"]
    process = subprocess.Popen([*command, "--journal", str(journal)], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if "Uvicorn running on " in line:
            return process, line.split("Uvicorn running on ")[1].split()[0]
    raise AssertionError("the server did not start")


class Stream:
    """A stream that a client reads: its text so far, and whether it came to its end."""

    def __init__(self, body: dict[str, Any]) -> None:
        self.body = body
        self.id = ""
        self.text = ""
        self.ended = False
        self.error: Exception | None = None

    async def read(self, http: httpx.AsyncClient, heard: asyncio.Event) -> None:
        try:
            async with http.stream("POST", "/v1/completions", json=self.body | {"stream": True}) as response:
                async for line in response.aiter_lines():
                    if line == "data: [DONE]":
                        self.ended = True
                    elif line:
                        part = json.loads(line.removeprefix("data: "))
                        self.id = part["id"]
                        self.text += part["choices"][0]["text"]
                    heard.set()
        except httpx.HTTPError as error:
            self.error = error


def whole_answers(folder: Path, files: list[Path], bodies: list[dict[str, Any]]) -> list[str]:
    """What ``generate`` goes on with, with the hooks of each body's intervention, in one batch for each of these."""
    model, tokenizer = load_checkpoint(str(folder))
    texts = [""] * len(bodies)
    for path in files:
        numbers = [i for i, body in enumerate(bodies) if body["intervention"] == path.stem]
        most = max(bodies[i]["max_tokens"] for i in numbers)
        batch = tokenizer(
            [bodies[i]["prompt"] for i in numbers], return_tensors="pt", padding=True, padding_side="left"
        )
        with apply(model, path), torch.inference_mode():
            ids, mask = batch["input_ids"], batch["attention_mask"]
            written = model.generate(ids, attention_mask=mask, max_new_tokens=most, do_sample=False)[:, ids.shape[1] :]
        for i, row in zip(numbers, written, strict=True):
            texts[i] = tokenizer.decode(row[: bodies[i]["max_tokens"]], skip_special_tokens=True)
    return texts


def test_a_server_killed_amid_streams_sent_no_wrong_text_and_lost_no_answer(tiny_directories, files, tmp_path):
    journal = tmp_path / "answers.jsonl"
    bodies = [
        {"prompt": PROMPTS[i // 2], "max_tokens": 10 + 10 * i, "intervention": files[i % 2].stem} for i in range(32)
    ]
    expected = whole_answers(tiny_directories["llama"], files[:2], bodies)
    streams = [Stream(body) for body in bodies]

    async def read_until_some_end(address: str, process: subprocess.Popen[str]) -> None:
        heard = asyncio.Event()
        async with httpx.AsyncClient(base_url=address, timeout=60) as http:
            tasks = [asyncio.create_task(stream.read(http, heard)) for stream in streams]
            while sum(stream.ended for stream in streams) < 4 or not all(stream.text for stream in streams):
                await heard.wait()
                heard.clear()
            os.kill(process.pid, signal.SIGKILL)
            await asyncio.gather(*tasks)

    process, address = started(files[:2], journal)
    asyncio.run(read_until_some_end(address, process))
    process.wait()
    kept = {record["id"]: record["answer"] for record in lines_of(journal)}
    for stream, text in zip(streams, expected, strict=True):
        assert (stream.error is None) == stream.ended
        assert stream.text == text if stream.ended else text.startswith(stream.text)
    assert sum(stream.ended for stream in streams) < 32
    assert {stream.id: stream.text for stream in streams if stream.ended}.items() <= kept.items()
    assert set(kept.values()) <= set(expected)
    # As if it had been killed within a line.
    with journal.open("ab") as half:
        half.write(b'{"id": "half')

    async def ask_and_stop(address: str, process: subprocess.Popen[str]) -> list[Any]:
        async with httpx.AsyncClient(base_url=address, timeout=60) as http:
            tasks = [asyncio.create_task(http.post("/v1/completions", json=body)) for body in bodies]
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            process.terminate()
            return await asyncio.gather(*tasks, return_exceptions=True)

    process, address = started(files[:2], journal)
    responses = asyncio.run(ask_and_stop(address, process))
    # uvicorn ends as the signal would have ended it, once all is answered.
    assert process.wait(60) in (0, -signal.SIGTERM)
    answers = [
        (response.json()["choices"][0]["text"], text)
        for response, text in zip(responses, expected, strict=True)
        if isinstance(response, httpx.Response)
    ]
    assert answers
    assert all(found == text for found, text in answers)
    after = [record["answer"] for record in lines_of(journal) if record["id"] not in kept]
    assert sorted(after) == sorted(found for found, _ in answers)
    assert {record["id"] for record in lines_of(journal)} >= kept.keys()


def lines_of(journal: Path) -> list[dict[str, Any]]:
    """The whole lines of a journal."""
    records = []
    for line in journal.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def test_an_address_that_others_reach_needs_a_key(files):
    command = [sys.executable, "-m", "conflictscope.cli", "serve", str(files[0]), "--host", "0.0.0.0"]
    found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert found.returncode == 2
    assert "give --api-key too" in found.stderr


def test_who_hangs_up_is_not_generated_for(tiny_directories, files):
    engine = engine_of(tiny_directories["llama"], files)
    received: list[Any] = []
    asked = CompletionRequest(prompt=PROMPTS[0], stream=True, max_tokens=500)
    jobs = engine.jobs([engine.tokenizer(PROMPTS[0])["input_ids"]], asked, lambda _, event: received.append(event))
    engine.submit(jobs)
    while not received:
        time.sleep(0.001)
    jobs[0].cancelled.set()
    engine.close()
    assert isinstance(received[-1], Done)
    assert received[-1].tokens < 500
