"""Answers that share passes, against transformers' ``generate`` for each alone."""

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers import DynamicCache, MambaConfig, MambaForCausalLM

from conflictscope.serve import worker as worker_module
from conflictscope.serve.answers import Answer
from conflictscope.serve.batch import Batch, can_batch
from conflictscope.serve.jobs import Done, Event, Job
from conflictscope.serve.metrics import Metrics
from conflictscope.serve.requests import CompletionRequest, Limits
from conflictscope.serve.worker import Worker
from interp.anatomy import Anatomy
from interp.inputs import padding_id, token_ids
from interventions import two_streams
from interventions.base import Acting, Intervention, Patch, applied
from interventions.decoding import CAD, COIECD, AdaCAD, CKPlug
from interventions.decore import DeCoRe
from interventions.dial import DialScale, TrustDial
from interventions.dola import DoLa
from interventions.features import FeatureEdit
from interventions.feedforward import FeedForwardScaling
from interventions.gate import ConflictGate, GateReading
from interventions.heads import HeadScaling
from interventions.juice import AddedHead, JuICE
from interventions.rows import shares_passes
from interventions.steering import Steering
from interventions.tokens import TOKENS
from tests.interventions.test_features import case
from tests.tiny import tiny_conflicts

VECTOR = torch.randn(32, generator=torch.Generator().manual_seed(0))
HEADS = HeadScaling.of([(1, 1), (2, 3)], -2.0)
EXAMPLES = tiny_conflicts().examples
PROMPTS = [example.prompt for example in EXAMPLES]
# Of different lengths, the shortest first.
TEXTS = [*(" ".join(prompt.split()[: 1 + i]) for i, prompt in enumerate(PROMPTS[:4])), *PROMPTS]
Edits = tuple[Intervention, ...]


@pytest.fixture(scope="module")
def features(tmp_path_factory) -> FeatureEdit:
    folder = tmp_path_factory.mktemp("saes")
    layers = (case(folder, "jumprelu", 1).edit, case(folder, "topk", 2, seed=1).edit)
    return FeatureEdit(layers, 2.0, tokens="answer")


def kinds_for(model: Any, features: FeatureEdit) -> dict[str, Edits]:
    """Edits of every kind that can share passes, with gates that some prompts open."""
    dial = TrustDial((DialScale(1, 1, -1.0, 3.0), DialScale(2, 2, 2.0, -2.0)))
    threshold = middle_score(model)

    def gated(*edits: Intervention) -> ConflictGate:
        return ConflictGate("block", 0, VECTOR, 0.0, threshold, edits)

    return {
        "none": (),
        "heads": (HEADS,),
        "less of the heads": (HEADS.scaled(0.4),),
        "dial to memory": (dial.turned(-1.0),),
        "dial to context": (dial.turned(0.7),),
        "feed-forward": (FeedForwardScaling(((0, 0.3), (2, -1.0))),),
        **{f"steering at {tokens}": (Steering(1, 3 * VECTOR, tokens=tokens),) for tokens in TOKENS},
        "replacing": (Steering(1, 3 * VECTOR, 0.7, "generated", "replace"),),
        "features": (features,),
        "gate": (gated(HEADS, Steering(2, 3 * VECTOR, tokens="answer")),),
        "soft gate of two sites": (
            ConflictGate("block", 0, VECTOR, 0.0, threshold, (HEADS,), (GateReading("mlp", 0, VECTOR),), soft=True),
        ),
        "cad": (CAD(1.0),),
        "cad and heads": (HEADS, CAD(0.5)),
        "adacad": (AdaCAD(0.3),),
        "coiecd": (COIECD(),),
        "ck-plug": (CKPlug(),),
        "cad and a gate": (gated(HEADS), CAD(1.0)),
        "cad behind a gate": (gated(HEADS, CAD(1.0)),),
    }


def middle_score(model: Any) -> float:
    """A threshold between the probe's scores of all texts, each read by itself."""
    found: list[float] = []
    hook = (
        Anatomy(model)
        .module("block", 0)
        .register_forward_hook(
            lambda _, __, out: found.append(float((out[0] if isinstance(out, tuple) else out)[0, -1] @ VECTOR))
        )
    )
    with torch.inference_mode():
        for ids in token_ids(model.tokenizer, TEXTS):
            model(input_ids=torch.tensor([ids]))
    hook.remove()
    ordered = sorted(found)
    return (ordered[len(found) // 2] + ordered[len(found) // 2 - 1]) / 2


def job_of(model: Any, edits: Edits, number: int, max_tokens: int, send: Callable[[Event], None] = print, **asked: Any):
    """A job for one of the texts."""
    acting = Acting.together(edit.acting(model) for edit in edits)
    text = TEXTS[number % len(TEXTS)]
    prompt, bare = token_ids(model.tokenizer, [text, f"The {number}th of them all is"])
    return Job(
        prompt,
        CompletionRequest(prompt=text, **asked),
        "some",
        acting,
        send,
        max_tokens,
        None if acting.rule is None else bare,
        asked.get("seed"),
    )


def alone(model: Any, edits: Edits, job: Job, **options: Any) -> list[int]:
    """What ``generate`` gives the same job."""
    options = {"do_sample": False, "max_new_tokens": job.max_tokens, "pad_token_id": padding_id(model)} | options
    ids = torch.tensor([job.prompt])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.inference_mode():
        if job.bare is not None:
            without = torch.tensor([job.bare])
            bare = {"input_ids": without, "attention_mask": torch.ones_like(without)}
            *others, rule = edits
            with applied(model, *others):
                written = two_streams.generate(model, rule, **inputs, without=bare, **options)
        else:
            with applied(model, *edits):
                written = model.generate(**inputs, **options)
    return written[0, len(job.prompt) :].tolist()


def ends_of(model: Any) -> list[int]:
    return [model.generation_config.eos_token_id]


def begun(model: Any, job: Job) -> Answer:
    return Answer(job, model.tokenizer, ends_of(model), model.device)


def together(model: Any, jobs: Sequence[Job], seed: int) -> list[Answer]:
    """Answers to jobs that join a batch at random steps, a few at a time; some are cancelled at random."""
    rng = random.Random(seed)
    batch, answers = Batch(model), [begun(model, job) for job in jobs]
    waiting = rng.sample(answers, len(answers))
    while waiting or batch.answers:
        joining = [waiting.pop() for _ in range(min(rng.choice([0, 0, 1, 2, 5]), len(waiting)))]
        if joining:
            batch.join(joining)
        batch.leave()
        if batch.answers:
            batch.step()
            if rng.random() < 0.1:
                rng.choice(batch.answers).job.cancelled.set()
        batch.leave()
    assert batch.n_rows == 0
    return answers


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt-neox", "mistral", "gemma2", "gemma3"])
def test_each_row_gets_what_it_gets_alone(tiny_plain, features, architecture):
    model = tiny_plain(architecture)
    rng = random.Random(architecture)
    kinds = kinds_for(model, features)
    every = [(edits, rng.randrange(len(TEXTS)), rng.randint(1, 14)) for _ in range(2) for edits in kinds.values()]
    jobs = [job_of(model, *one) for one in every]
    for (edits, *_), answer in zip(every, together(model, jobs, seed=0), strict=True):
        assert answer.error is None
        expected = alone(model, edits, answer.job)
        assert answer.tokens == expected[: len(answer.tokens)]
        assert answer.job.cancelled.is_set() or len(answer.tokens) == len(expected)


def test_edits_of_one_setting_share_a_group_and_gates_open_for_some_of_it_only(tiny_plain, features):
    model = tiny_plain("llama")
    for kind in ("gate", "cad behind a gate"):
        edits = kinds_for(model, features)[kind]
        jobs = [job_of(model, edits, number, 6) for number in range(len(TEXTS))]
        acting = jobs[0].acting
        for job in jobs:
            job.acting = acting
        answers = together(model, jobs, seed=1)
        (gate,) = edits
        assert isinstance(gate, ConflictGate)
        opened = 0
        for answer in answers:
            expected = alone(model, edits, answer.job)
            assert answer.tokens == expected[: len(answer.tokens)]
            opened += expected == alone(model, gate.edits, answer.job)
        assert 0 < opened < len(answers)


def test_a_seeded_row_is_sampled_as_transformers_samples_it_alone(tiny_plain, features):
    model = tiny_plain("llama")
    settings = [(0.7, 1.0), (1.5, 0.8), (3.0, 0.5)]
    jobs = [
        job_of(model, (HEADS,) if number % 2 else (), number, 10, seed=number, temperature=temperature, top_p=top_p)
        for number, (temperature, top_p) in enumerate(settings * 2)
    ]
    for number, answer in enumerate(together(model, jobs, seed=2)):
        torch.manual_seed(number)
        temperature, top_p = (settings * 2)[number]
        options = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
        expected = alone(model, (HEADS,) if number % 2 else (), answer.job, **options)
        assert answer.tokens == expected[: len(answer.tokens)]


def test_an_edit_that_fails_ends_its_own_rows_only(tiny_plain):
    model = tiny_plain("llama")

    def fails(values: torch.Tensor) -> torch.Tensor:
        if values.shape[1] == 1:
            raise ValueError("not this one")
        return values

    good, bad = (job_of(model, (), number, 5) for number in (0, 5))
    bad.acting = Acting([Patch("block", 1, fails)])
    batch, answers = Batch(model), [begun(model, good), begun(model, bad)]
    batch.join(answers)
    while batch.answers:
        batch.step()
        batch.leave()
    assert str(answers[1].error) == "not this one"
    assert len(answers[1].tokens) == 1
    assert answers[0].tokens == alone(model, (), good)


def test_a_pass_that_fails_for_new_rows_leaves_the_others_as_they_were(tiny_plain, monkeypatch):
    model = tiny_plain("llama")
    first, second = (begun(model, job_of(model, (HEADS,), number, 5)) for number in (0, 5))
    batch = Batch(model)
    batch.join([first])
    with monkeypatch.context() as patch:
        patch.setattr(type(model), "forward", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            batch.join([second])
    while batch.answers:
        batch.step()
        batch.leave()
    assert first.tokens == alone(model, (HEADS,), first.job)


# The thread


@contextmanager
def working(model: Any, **limits: Any) -> Iterator[Worker]:
    worker = Worker(model, model.tokenizer, limits=Limits(**limits), metrics=Metrics(), journal=None)
    yield worker
    worker.close()


def submitted(worker: Worker, model: Any, every: Sequence[tuple[Edits, int, int]]) -> list[tuple[Job, list[Event]]]:
    """Jobs that were submitted, and where what becomes of them is put."""
    found: list[tuple[Job, list[Event]]] = []
    for one in every:
        events: list[Event] = []
        found.append((job_of(model, *one, events.append), events))
        worker.submit([found[-1][0]])
    return found


def check(model: Any, every: Sequence[tuple[Edits, int, int]], found: Sequence[tuple[Job, list[Event]]]) -> None:
    for (edits, *_), (job, events) in zip(every, found, strict=True):
        expected = alone(model, edits, job)
        (done,) = events
        assert isinstance(done, Done), done
        assert done.text == model.tokenizer.decode(expected, skip_special_tokens=True)
        assert done.tokens == len(expected)
        assert done.reason == ("stop" if expected[-1] in ends_of(model) else "length")


def test_what_cannot_share_passes_is_answered_between_the_others_steps(tiny_plain):
    model = tiny_plain("llama")
    apart: list[Edits] = [
        (JuICE((AddedHead(1, 1, 2.0), AddedHead(2, 0, -1.0))),),
        (DeCoRe(((1, 1), (2, 3))),),
        (DoLa((0, 1)),),
        (ConflictGate("block", 0, VECTOR, 0.0, -1e9, (JuICE((AddedHead(1, 1, 2.0),)),)),),
    ]
    every = [(edits, number, 7) for number, edits in enumerate([*apart[:3], (HEADS,), (), (CAD(1.0),)] * 2)]
    for edits in apart[:3]:
        assert not shares_passes(edits[0].patches(model))
    with working(model) as worker:
        found = submitted(worker, model, every)
    check(model, every, found)


def test_a_model_with_a_cache_of_its_own_is_answered_one_at_a_time_and_said_so(tiny_plain, monkeypatch, caplog):
    model = tiny_plain("mistral")
    assert can_batch(model)
    mamba = MambaForCausalLM(MambaConfig(vocab_size=20, hidden_size=16, num_hidden_layers=1, state_size=4))
    assert not can_batch(mamba)
    monkeypatch.setattr(worker_module, "can_batch", lambda _: False)
    every: list[tuple[Edits, int, int]] = [((HEADS,), 0, 8), ((Steering(1, VECTOR),), 9, 8), ((CAD(1.0),), 4, 8)]
    with working(model) as worker:
        found = submitted(worker, model, every)
    check(model, every, found)
    assert caplog.text.count("answers are given one at a time") == 1


@pytest.mark.parametrize(
    ("limits", "most_rows", "most_read"),
    [({"rows": 3}, 3, 10), ({"cache_tokens": 50}, 3, 10), ({"prefill_tokens": 30}, 10, 2), ({"rows": 1}, 1, 1)],
)
def test_a_batch_keeps_within_its_limits(tiny_plain, monkeypatch, limits, most_rows, most_read):
    model = tiny_plain("llama")
    rows, read = [], []
    begin = threading.Event()

    class Spied(Batch):
        def join(self, answers: Sequence[Answer]) -> None:
            read.append(len(answers))
            super().join(answers)
            rows.append(self.n_rows)

        def leave(self) -> list[Answer]:
            begin.wait()
            return super().leave()

    monkeypatch.setattr(worker_module, "Batch", Spied)
    every: list[tuple[Edits, int, int]] = [((), 4, 3)] * 10
    assert 10 <= len(token_ids(model.tokenizer, [TEXTS[4]])[0]) <= 12
    with working(model, **limits) as worker:
        found = submitted(worker, model, every)
        begin.set()
    check(model, every, found)
    assert max(rows) <= most_rows
    assert max(read) <= most_read
    assert max(rows) == most_rows or most_rows == 10


def test_a_prompt_beyond_the_limits_of_a_batch_is_answered_by_itself(tiny_plain):
    model = tiny_plain("llama")
    every: list[tuple[Edits, int, int]] = [((), 4, 3), ((CAD(1.0),), 5, 3)] * 2
    with working(model, rows=1, cache_tokens=1, prefill_tokens=1) as worker:
        found = submitted(worker, model, every)
    check(model, every, found)


def test_the_real_model_answers_eight_requests_as_each_alone(smollm2):
    model: Any = smollm2.original_model
    tokenizer = smollm2.tokenizer
    heads = HeadScaling.of([(10, 1), (15, 3), (20, 5)], -1.0)
    direction = 20 * torch.randn(576, generator=torch.Generator().manual_seed(1))
    probe = torch.randn(576, generator=torch.Generator().manual_seed(2))
    kinds: list[Edits] = [
        (),
        (heads,),
        (heads.scaled(2),),
        (Steering(12, direction, tokens="answer"),),
        (ConflictGate("block", 5, probe, 0.0, 0.0, (heads,)),),
        (FeedForwardScaling(((20, 0.0),)),),
        (CAD(0.5),),
        (Steering(12, direction),),
    ]
    jobs = []
    for number, edits in enumerate(kinds):
        bare = "The capital of Japan is"
        text = "Note. " * (number % 3) + f"The capital of Japan is Lima. {bare}"
        prompt, without = token_ids(tokenizer, [text, bare])
        acting = Acting.together(edit.acting(model) for edit in edits)
        second = None if acting.rule is None else without
        jobs.append(Job(prompt, CompletionRequest(prompt=text), "some", acting, print, 8, second))
    batch = Batch(model)
    answers = [Answer(job, tokenizer, ends_of(model), model.device) for job in jobs]
    batch.join(answers[:5])
    batch.step()
    batch.join(answers[5:])
    while batch.answers:
        batch.step()
        batch.leave()
    found = [answer.tokens for answer in answers]
    assert found == [alone(model, edits, job) for edits, job in zip(kinds, jobs, strict=True)]
    assert len({tuple(tokens) for tokens in found}) > 3


def test_the_cache_that_transformers_makes_is_of_the_kinds_that_can_be_joined(tiny_plain):
    # Layers that slide are told from others, since they keep fewer tokens than were read.
    kinds = {
        name: {getattr(layer, "is_sliding", None) for layer in DynamicCache(config=tiny_plain(name).config).layers}
        for name in ("llama", "mistral", "gemma2")
    }
    assert kinds == {"llama": {False}, "mistral": {True}, "gemma2": {False, True}}


def test_what_fails_outside_a_pass_is_told_and_the_thread_goes_on(tiny_plain, monkeypatch):
    model = tiny_plain("llama")
    with working(model) as worker:
        with monkeypatch.context() as patch:
            patch.setattr(Batch, "leave", lambda _: 1 / 0)
            ((_, events),) = submitted(worker, model, [((HEADS,), 0, 4)])
            while not events:
                time.sleep(0.01)
        assert isinstance(events[0], ZeroDivisionError)
        ((job, later),) = submitted(worker, model, [((HEADS,), 0, 4)])
        while not any(isinstance(event, Done) for event in later):
            time.sleep(0.01)
    done = later[-1]
    assert isinstance(done, Done)
    assert done.text == model.tokenizer.decode(alone(model, (HEADS,), job), skip_special_tokens=True)
