from typing import Any

import pytest
import torch
from torch import nn

from interp.anatomy import Anatomy, transformers_model
from interp.errors import UserError
from interp.inputs import encode
from interventions.base import applied
from interventions.config import InterventionFile
from interventions.decoding import CAD
from interventions.dial import DialScale, TrustDial
from interventions.feedforward import FeedForwardScaling
from interventions.gate import ConflictGate, Familiar, GateReading
from interventions.heads import HeadScaling
from interventions.identity import ModelIdentity
from interventions.steering import Steering
from tests.tiny import few_bridges, tiny_conflicts

tiny_bridge = few_bridges
PROMPTS = [e.prompt for e in tiny_conflicts()]
VECTOR = torch.randn(32, generator=torch.Generator().manual_seed(0))
EDITS = (
    HeadScaling.of([(1, 1), (2, 3)], -2.0),
    FeedForwardScaling(((2, 0.0),)),
    Steering(1, 2 * VECTOR, tokens="answer"),
)
PARTS = ["block", "attention", "mlp", "output_projection"]


def tokens(model, inputs, **options: Any):
    network: Any = transformers_model(model)
    prompts = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with torch.inference_mode():
        return network.generate(**prompts, max_new_tokens=5, min_new_tokens=5, do_sample=False, **options)


def read(model: nn.Module, part: Any, prompts: list[str]) -> torch.Tensor:
    """What a part of block 0 holds at the end of each prompt, read one prompt at a time, ``(n, width)``."""
    found: list[torch.Tensor] = []
    module = Anatomy(model).module(part, 0)

    def keep(_: nn.Module, *given: Any) -> None:
        values = given[-1][0] if isinstance(given[-1], tuple) else given[-1]
        found.append(values[0, -1].clone())

    is_input = part == "output_projection"
    handle = module.register_forward_pre_hook(keep) if is_input else module.register_forward_hook(keep)
    with torch.inference_mode():
        for prompt in prompts:
            transformers_model(model)(**encode(model, [prompt]))
    handle.remove()
    return torch.stack(found)


def gate_for(model: nn.Module, part: Any, prompts: list[str], edits: Any = EDITS) -> tuple[ConflictGate, torch.Tensor]:
    """A gate that opens for the half of the prompts with the higher score, and which these are."""
    values = read(model, part, prompts)
    weight = torch.randn(values.shape[1], generator=torch.Generator().manual_seed(1))
    scores = values @ weight
    ordered = scores.sort().values
    middle = len(prompts) // 2
    threshold = float(ordered[middle - 1 : middle + 1].mean()) + 0.5
    return ConflictGate(part, 0, weight, 0.5, threshold, edits), scores + 0.5 > threshold


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"num_beams": 2}], ids=["cache", "no cache", "beams"])
def test_open_rows_are_edited_and_the_others_are_not(tiny_bridge, part, options):
    if part == "mlp" and Anatomy(tiny_bridge).parallel:
        # The first MLP reads the embedding alone there, and all prompts end with the same word.
        part = "attention"
    gate, is_open = gate_for(tiny_bridge, part, PROMPTS)
    inputs = encode(tiny_bridge, PROMPTS)
    plain = tokens(tiny_bridge, inputs, **options)
    with applied(tiny_bridge, *EDITS):
        edited = tokens(tiny_bridge, inputs, **options)
    assert is_open.any()
    assert not is_open.all()
    assert (plain != edited)[is_open].any()
    with applied(tiny_bridge, gate):
        assert torch.equal(tokens(tiny_bridge, inputs, **options), torch.where(is_open[:, None], edited, plain))
    assert torch.equal(tokens(tiny_bridge, inputs, **options), plain)


def test_a_pass_gives_open_rows_the_edited_logits_and_others_the_plain_ones_bit_for_bit(tiny_bridge):
    gate, is_open = gate_for(tiny_bridge, "block", PROMPTS)
    network: Any = transformers_model(tiny_bridge)
    inputs = encode(tiny_bridge, PROMPTS)
    with torch.inference_mode():
        plain = network(**inputs).logits
        with applied(tiny_bridge, *EDITS):
            edited = network(**inputs).logits
        with applied(tiny_bridge, gate):
            assert torch.equal(network(**inputs).logits, torch.where(is_open[:, None, None], edited, plain))


def test_the_decision_is_made_anew_for_new_prompts(tiny_llama):
    gate, is_open = gate_for(tiny_llama, "block", PROMPTS)
    first, second = (PROMPTS[int(is_open.int().argmax())], PROMPTS[int((~is_open).int().argmax())])
    batches = [encode(tiny_llama, [prompt]) for prompt in (first, second, first)]
    alone = []
    for batch in batches:
        with applied(tiny_llama, gate):
            alone.append(tokens(tiny_llama, batch))
    with applied(tiny_llama, gate):
        for batch, expected in zip(batches, alone, strict=True):
            assert torch.equal(tokens(tiny_llama, batch), expected)


def test_padding_on_the_right_reads_the_last_token_of_each_prompt(tiny_llama):
    gate, is_open = gate_for(tiny_llama, "block", PROMPTS)
    network: Any = transformers_model(tiny_llama)
    batch = tiny_llama.tokenizer(PROMPTS, return_tensors="pt", padding=True, padding_side="right")
    with torch.inference_mode():
        plain = network(**batch).logits
        with applied(tiny_llama, gate):
            gated = network(**batch).logits
    changed = (plain != gated).flatten(1).any(1)
    assert torch.equal(changed, is_open)


@pytest.mark.parametrize(
    "edit",
    [
        HeadScaling.of([(1, 0), (2, 0)], 0.0),
        FeedForwardScaling(((1, 0.0),)),
        Steering(1, VECTOR),
        TrustDial((DialScale(1, 0, 0.0, 2.0),), 1.0),
        # It does nothing as it stands, but may be turned.
        TrustDial((DialScale(1, 0, 0.0, 2.0),), 0.0),
    ],
)
def test_an_edit_that_is_not_above_its_gate_is_refused(edit):
    with pytest.raises(UserError, match="The gate reads layer 1, but layer 1 is edited, which has been passed"):
        ConflictGate("block", 1, VECTOR, 0.0, 0.0, (edit,))
    ConflictGate("block", 0, VECTOR, 0.0, 0.0, (edit,))


def test_a_dial_at_zero_and_a_gate_that_never_opens_change_no_bit(tiny_llama):
    inputs = encode(tiny_llama, PROMPTS)
    network: Any = transformers_model(tiny_llama)
    never = ConflictGate("block", 0, VECTOR, 0.0, 1e8, EDITS)
    off = ConflictGate("block", 0, VECTOR, 0.0, -1e8, (TrustDial((DialScale(1, 0, 0.0, 2.0),), 0.0),))
    with torch.inference_mode():
        before = network(**inputs).logits
        for gate in (never, off):
            with applied(tiny_llama, gate):
                assert torch.equal(network(**inputs).logits, before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.ones(32, 2)}, "is a row of finite numbers"),
        ({"weight": torch.full((32,), float("nan"))}, "is a row of finite numbers"),
        ({"bias": float("inf")}, "must be finite"),
        ({"threshold": float("nan")}, "must be finite"),
        ({"edits": ()}, "needs an edit"),
    ],
)
def test_a_gate_that_is_none_is_refused(change, message):
    given: dict[str, Any] = {
        "part": "block",
        "layer": 0,
        "weight": VECTOR,
        "bias": 0.0,
        "threshold": 0.0,
        "edits": EDITS,
    }
    with pytest.raises(UserError, match=message):
        ConflictGate(**{**given, **change})


def test_a_probe_of_another_width_or_layer_is_refused_and_nothing_stays_attached(tiny_llama):
    for gate, message in (
        (ConflictGate("block", 0, torch.ones(31), 0.0, 0.0, EDITS), "reads 31 numbers, but this model has 32"),
        (ConflictGate("block", 7, VECTOR, 0.0, 0.0, (HeadScaling.of([(8, 0)], 0.0),)), "Layer 7 does not exist"),
    ):
        with pytest.raises(UserError, match=message):
            gate.attach(tiny_llama)
    network = transformers_model(tiny_llama)
    assert not network._forward_pre_hooks
    assert "generate" not in vars(network)


def rows_alone(model: nn.Module, prompts: list[str], *edits: Any) -> torch.Tensor:
    """The next token's logits of each prompt, read one at a time under edits, ``(n, d_vocab)``."""
    with applied(model, *edits), torch.inference_mode():
        return torch.cat([transformers_model(model)(**encode(model, [one])).logits[:, -1] for one in prompts])


def test_a_probe_of_several_sites_is_the_sum_of_its_readings(tiny_llama):
    parts = ("attention", "output_projection", "block")
    values = [read(tiny_llama, part, PROMPTS) for part in parts]
    generator = torch.Generator().manual_seed(3)
    weights = [torch.randn(found.shape[1], generator=generator) for found in values]
    scores = torch.stack([found @ weight for found, weight in zip(values, weights, strict=True)]).sum(0)
    threshold = float(scores.sort().values[len(PROMPTS) // 2 - 1 : len(PROMPTS) // 2 + 1].mean())
    also = tuple(GateReading(part, 0, weight) for part, weight in zip(parts[:2], weights[:2], strict=True))
    gate = ConflictGate("block", 0, weights[2], 0.0, threshold, EDITS, also)
    inputs = encode(tiny_llama, PROMPTS)
    plain = tokens(tiny_llama, inputs)
    with applied(tiny_llama, *EDITS):
        edited = tokens(tiny_llama, inputs)
    with applied(tiny_llama, gate):
        gated = tokens(tiny_llama, inputs)
    assert torch.equal(gated, torch.where((scores > threshold)[:, None], edited, plain))


def test_a_soft_gate_scales_heads_by_its_probability(tiny_llama):
    weight, heads = VECTOR, [(1, 1), (2, 3)]
    scores = read(tiny_llama, "block", PROMPTS) @ weight
    threshold = float(scores.median())
    gate = ConflictGate("block", 0, weight, 0.0, threshold, (HeadScaling.of(heads, -2.0),), soft=True)
    expected = [
        rows_alone(tiny_llama, [prompt], HeadScaling.of(heads, 1 - 3 * float(share)))
        for prompt, share in zip(PROMPTS, (scores - threshold).sigmoid(), strict=True)
    ]
    torch.testing.assert_close(rows_alone(tiny_llama, PROMPTS, gate), torch.cat(expected), atol=1e-4, rtol=1e-4)


def test_what_is_unlike_all_that_was_seen_stays_closed(tiny_llama):
    values = read(tiny_llama, "block", PROMPTS)
    center, scale = values[0], torch.full_like(values[0], 0.5)
    distances = ((values - center) / 0.5).square().mean(1)
    limit = float(distances.sort().values[len(PROMPTS) // 2 - 1 : len(PROMPTS) // 2 + 1].mean())
    heads = HeadScaling.of([(1, 1), (2, 3)], -2.0)
    gate = ConflictGate("block", 0, VECTOR, 0.0, -1e8, (heads,), familiar=Familiar(center, scale, limit))
    plain, edited, gated = (rows_alone(tiny_llama, PROMPTS, *edits) for edits in ((), (heads,), (gate,)))
    assert torch.equal(gated, torch.where((distances <= limit)[:, None], edited, plain))


def test_what_a_gate_reads_survives_its_file(tiny_llama, tmp_path):
    familiar = Familiar(VECTOR, VECTOR.abs() + 1, 2.5)
    also = (GateReading("attention", 0, 2 * VECTOR),)
    gate = ConflictGate("block", 0, VECTOR, 0.5, 0.25, (HeadScaling.of([(1, 1)], 0.0),), also, True, familiar)
    path = tmp_path / "gated.json"
    InterventionFile.of([gate], name="gated", model=ModelIdentity.of(tiny_llama, "tiny")).save(path)
    (again,) = InterventionFile.load(path).build()
    assert isinstance(again, ConflictGate)
    assert torch.equal(rows_alone(tiny_llama, PROMPTS, again), rows_alone(tiny_llama, PROMPTS, gate))
    assert torch.equal(again.also[0].weight, 2 * VECTOR)
    assert again.familiar is not None
    assert again.familiar.limit == 2.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"also": (GateReading("block", 1, VECTOR),)}, "decides in the highest layer"),
        ({"also": (GateReading("block", 0, VECTOR),)}, "each site once"),
        ({"familiar": Familiar(VECTOR, torch.zeros(32), 1.0)}, "standard deviations above 0"),
        ({"familiar": Familiar(VECTOR, torch.ones(32), 0.0)}, "strangeness .* above 0"),
    ],
)
def test_what_a_gate_cannot_read_is_one_sentence(change, message):
    with pytest.raises(UserError, match=message):
        ConflictGate("block", 0, VECTOR, 0.0, 0.0, EDITS, **change)


def test_a_rule_for_the_next_token_is_refused_behind_a_soft_gate(tiny_llama):
    gate = ConflictGate("block", 0, VECTOR, 0.0, 0.0, (CAD(1.0),), soft=True)
    with pytest.raises(UserError, match="not soft"):
        gate.acting(tiny_llama)
