"""What OpenAI's clients send and understand, with their own package and with bodies as others write them."""

from collections.abc import Iterator
from typing import Any

import openai
import pytest
import torch
from fastapi.testclient import TestClient

from conflictscope.serve.app import build_app
from tests.conflictscope.serve.test_app import PROMPTS, answer, engine_of, files

__all__ = ["answer", "files"]
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{{ 'quietly ' if quiet }}assistant:"


@pytest.fixture(scope="module")
def engine(tiny_directories, files):
    engine = engine_of(tiny_directories["llama"], files)
    engine.tokenizer.chat_template = TEMPLATE
    return engine


@pytest.fixture(scope="module")
def raw(engine) -> Iterator[TestClient]:
    with TestClient(build_app(engine, api_key="secret"), headers={"Authorization": "Bearer secret"}) as client:
        yield client


@pytest.fixture(scope="module")
def client(raw) -> openai.OpenAI:
    return openai.OpenAI(base_url="http://testserver/v1", api_key="secret", http_client=raw, max_retries=0)


def logprobs_of(engine: Any, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """Log probabilities of each next token, by one pass over prompt and answer."""
    with torch.inference_mode():
        logits = engine.model(input_ids=torch.tensor([prompt + answer])).logits[0]
    return logits[len(prompt) - 1 : -1].float().log_softmax(-1)


def test_completions_of_several_prompts_have_several_choices(client, answer):
    found = client.completions.create(model="tiny:gate", prompt=PROMPTS[:3], max_tokens=6, user="me")
    assert [choice.index for choice in found.choices] == [0, 1, 2]
    assert [choice.text for choice in found.choices] == [answer(prompt, "gate") for prompt in PROMPTS[:3]]
    assert found.usage
    assert found.usage.completion_tokens == 18
    assert found.usage.total_tokens == found.usage.prompt_tokens + 18


def test_prompts_may_be_token_ids(client, engine, answer):
    ids = engine.tokenizer(PROMPTS[:2])["input_ids"]
    expected = [answer(prompt, "heads") for prompt in PROMPTS[:2]]
    found = client.completions.create(model="tiny", prompt=ids, max_tokens=6)
    assert [choice.text for choice in found.choices] == expected
    assert client.completions.create(model="tiny", prompt=ids[0], max_tokens=6).choices[0].text == expected[0]


def test_several_sampled_choices_have_seeds_of_their_own_and_greedy_ones_are_equal(client, engine):
    asked: dict[str, Any] = {"model": "tiny", "prompt": PROMPTS[0], "max_tokens": 8}
    found = client.completions.create(**asked, n=3, temperature=2, seed=7)
    texts = [choice.text for choice in found.choices]
    each = [client.completions.create(**asked, temperature=2, seed=7 + i).choices[0].text for i in range(3)]
    assert texts == each
    assert len(set(texts)) == 3
    before = engine.metrics.tokens.labels("heads")._value.get()
    greedy = client.completions.create(**asked, n=4)
    assert len({choice.text for choice in greedy.choices}) == 1
    assert [choice.index for choice in greedy.choices] == [0, 1, 2, 3]
    assert engine.metrics.tokens.labels("heads")._value.get() == before + 8
    parts = list(client.completions.create(**asked, n=3, temperature=2, seed=7, stream=True))
    said = ["".join(p.choices[0].text for p in parts if p.choices[0].index == index) for index in range(3)]
    assert said == texts


def test_log_probabilities_are_those_of_one_pass_over_the_text(client, engine):
    prompt, unedited = engine.tokenizer(PROMPTS[1])["input_ids"], "tiny:none"
    found = client.completions.create(model=unedited, prompt=prompt, max_tokens=6, logprobs=3).choices[0]
    assert found.logprobs
    assert found.logprobs.tokens
    assert found.logprobs.token_logprobs
    assert found.logprobs.top_logprobs
    with torch.inference_mode():
        written = engine.model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False)[0, len(prompt) :]
    expected = logprobs_of(engine, prompt, written.tolist())
    assert found.logprobs.tokens == [engine.tokenizer.decode([token]) for token in written.tolist()]
    chosen = expected.gather(1, written[:, None])[:, 0]
    assert found.logprobs.token_logprobs == pytest.approx(chosen.tolist(), abs=1e-4)
    for told, best in zip(found.logprobs.top_logprobs, expected.topk(3).values.tolist(), strict=True):
        assert sorted(told.values(), reverse=True) == pytest.approx(best, abs=1e-4)
    assert found.logprobs.text_offset == [len("".join(found.logprobs.tokens[:i])) for i in range(6)]

    asked: dict[str, Any] = {"model": unedited, "messages": [{"role": "user", "content": "Rome?"}], "max_tokens": 6}
    chat = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2).choices[0]
    assert chat.logprobs
    assert chat.logprobs.content
    ids = engine.tokenizer("user: Rome?\nassistant:")["input_ids"]
    with torch.inference_mode():
        written = engine.model.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False)[0, len(ids) :]
    expected = logprobs_of(engine, ids, written.tolist()).topk(2).values
    told = [[top.logprob for top in token.top_logprobs] for token in chat.logprobs.content]
    assert torch.tensor(told).allclose(expected, atol=1e-4)
    assert all(token.bytes is None or bytes(token.bytes).decode() == token.token for token in chat.logprobs.content)
    streamed = list(client.chat.completions.create(**asked, logprobs=True, top_logprobs=2, stream=True))
    parts = [part.choices[0].logprobs for part in streamed]
    assert [token for part in parts if part and part.content for token in part.content] == chat.logprobs.content


def test_a_stream_tells_what_was_used_where_that_is_asked_and_only_then(client):
    asked: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Rome?"}], "max_tokens": 5}
    whole = client.chat.completions.create(**asked)
    plain = list(client.chat.completions.create(**asked, stream=True))
    assert all("usage" not in part.model_fields_set for part in plain)
    assert plain[0].choices[0].delta.role == "assistant"
    assert plain[-1].choices[0].finish_reason == "length"
    counted = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert counted[-1].choices == []
    assert counted[-1].usage == whole.usage
    assert all(part.usage is None for part in counted[:-1])
    for parts in (plain, counted):
        text = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
        assert text == whole.choices[0].message.content


def test_what_was_said_can_be_sent_back(client, answer):
    messages: list[Any] = [{"role": "developer", "content": "Short."}, {"role": "user", "content": "Rome?"}]
    first = client.chat.completions.create(model="tiny", messages=messages, max_tokens=4).choices[0].message
    assert first.content == answer("system: Short.\nuser: Rome?\nassistant:", "heads", tokens=4)
    messages += [first, {"role": "user", "content": [{"type": "text", "text": "And"}, {"type": "text", "text": "?"}]}]
    second = client.chat.completions.create(model="tiny", messages=messages, max_tokens=4).choices[0].message
    written = f"system: Short.\nuser: Rome?\nassistant: {first.content}\nuser: And?\nassistant:"
    assert second.content == answer(written, "heads", tokens=4)


def test_a_template_gets_what_it_uses_and_nothing_else(client, answer):
    asked: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Rome?"}], "max_tokens": 4}
    quiet = client.chat.completions.create(**asked, extra_body={"chat_template_kwargs": {"quiet": True}})
    assert quiet.choices[0].message.content == answer("user: Rome?\nquietly assistant:", "heads", tokens=4)
    with pytest.raises(openai.BadRequestError, match="not chat_template; leave it out"):
        client.chat.completions.create(**asked, extra_body={"chat_template_kwargs": {"chat_template": "{{ 1 }}"}})


def test_models_are_listed(client):
    found = client.models.list().data
    assert [model.id for model in found][:3] == ["tiny", "tiny:none", "tiny:heads"]
    assert {(model.object, model.owned_by) for model in found} == {("model", "conflictscope")}
    assert all(model.created > 1.7e9 for model in found)
    assert client.models.retrieve("tiny:heads") == found[2]
    with pytest.raises(openai.NotFoundError, match="no model 'large/one'; GET /v1/models lists"):
        client.models.retrieve("large/one")


def test_a_speaker_is_told_to_templates_that_write_one(client, engine, answer, monkeypatch):
    asked: dict[str, Any] = {"model": "tiny", "max_tokens": 4}
    named = [{"role": "user", "content": "Rome?", "name": "Ada"}, {"role": "user", "content": "Lima?"}]
    found = client.chat.completions.create(**asked, messages=named)
    assert found.choices[0].message.content == answer("user: Rome?\nuser: Lima?\nassistant:", "heads", tokens=4)
    template = "{% for m in messages %}{{ m.name if 'name' in m else m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    monkeypatch.setattr(engine.tokenizer, "chat_template", template)
    found = client.chat.completions.create(**asked, messages=named)
    assert found.choices[0].message.content == answer("Ada: Rome?\nuser: Lima?\nassistant:", "heads", tokens=4)


def test_what_is_refused_is_an_error_of_the_package(client):
    asked: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Rome?"}]}
    for options, sentence in (
        ({"frequency_penalty": 0.5}, "frequency_penalty: this server has nothing but 0 here"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools: Extra inputs are not permitted"),
        ({"top_logprobs": 2}, "set logprobs to true too"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs: Input should be less than or equal to 20"),
        ({"response_format": {"type": "json_object"}}, "response_format.type: Input should be 'text'"),
        ({"messages": [{"role": "tool", "content": "a", "tool_call_id": "b"}]}, "role: Input should be 'system'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "Input should be 'text'"),
    ):
        with pytest.raises(openai.BadRequestError) as error:
            client.chat.completions.create(**asked | options)
        assert sentence in error.value.message
    with pytest.raises(openai.AuthenticationError, match="API key is missing or wrong"):
        client.with_options(api_key="other").models.list()


NULLS = ["temperature", "top_p", "seed", "stop", "n", "stream", "stream_options", "logit_bias", "user", "model"]


@pytest.mark.parametrize(
    "body",
    [
        # As LangChain's ChatOpenAI writes it.
        {
            "messages": [{"content": "Be brief.", "role": "system"}, {"content": "Rome?", "role": "user"}],
            "model": "tiny",
            "frequency_penalty": 0.0,
            "max_completion_tokens": 4,
            "n": 1,
            "presence_penalty": 0.0,
            "stream": False,
            "temperature": 0.0,
            "top_p": 1.0,
            "logprobs": False,
        },
        # As clients do that write all fields that there are.
        dict.fromkeys([*NULLS, "tools", "logprobs", "top_logprobs", "response_format", "frequency_penalty"])
        | {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "Rome?", "name": None},
            ],
            "max_tokens": 4,
            "response_format": {"type": "text"},
            "store": False,
            "metadata": {"a": "b"},
            "logit_bias": {},
        },
    ],
)
def test_a_body_of_another_client_is_taken(raw, answer, body):
    found = raw.post("/v1/chat/completions", json=body)
    assert found.status_code == 200, found.text
    expected = answer("system: Be brief.\nuser: Rome?\nassistant:", "heads", tokens=4)
    assert found.json()["choices"][0]["message"] == {"role": "assistant", "content": expected}


def test_a_completion_with_what_says_nothing_is_taken(raw, answer):
    nothing = {"suffix": None, "echo": False, "best_of": 1, "logprobs": None, "presence_penalty": 0, "logit_bias": None}
    body = dict.fromkeys(NULLS) | nothing | {"prompt": PROMPTS[0], "max_tokens": 6}
    # As curl writes it.
    found = raw.post("/v1/completions", json=body).json()["choices"][0]
    assert found["text"] == answer(PROMPTS[0], "heads")
    zero = raw.post("/v1/completions", json=body | {"logprobs": 0}).json()["choices"][0]
    assert zero["logprobs"]["top_logprobs"] == [{}] * 6
