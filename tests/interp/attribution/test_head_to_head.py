from contextlib import ExitStack

import pytest
import torch

from interp.anatomy import Anatomy
from interp.attribution.examples import corrupted_partners, scorable
from interp.attribution.head_to_head import head_to_head
from interp.attribution.states import last_token_states
from interp.conflicts import ConflictSet
from interp.errors import UserError
from interp.inputs import encode
from interp.models import load_model
from tests.tiny import tiny_conflicts


def run(anatomy, inputs, hook):
    """One whole pass, with ``hook(layer, z)`` at every output projection; the last token's logits of each row."""
    with ExitStack() as hooks, torch.no_grad():
        for layer in range(anatomy.n_layers):
            module = anatomy.module("output_projection", layer)
            handle = module.register_forward_pre_hook(
                lambda _, inputs, layer=layer: (hook(layer, inputs[0].unflatten(-1, (anatomy.n_heads, -1))),)
            )
            hooks.callback(handle.remove)
        return anatomy.model(**inputs).logits[:, -1]


def brute_force(model, prompt, ids, senders, receiver, replacement, tokens):
    """Both passes of one prompt, with whole forwards and nothing kept between them; a row for every sender."""
    anatomy, inputs = Anatomy(model), encode(model, [prompt])
    copies = {name: tensor.expand(len(senders), -1) for name, tensor in inputs.items()}
    clean, heard = {}, {}

    def keep(layer, z):
        clean[layer] = z.clone()
        return z.flatten(-2)

    def with_sender(layer, z):
        heard[layer] = z.clone()
        frozen = clean[layer].repeat(len(senders), 1, 1, 1)
        for row, (of_layer, head) in enumerate(senders):
            if layer == of_layer:
                frozen[row, tokens, head] = replacement[of_layer, head]
        return frozen.flatten(-2)

    def with_receiver(layer, _):
        frozen = clean[layer].repeat(len(senders), 1, 1, 1)
        if layer == receiver[0]:
            frozen[:, -1, receiver[1]] = heard[layer][:, -1, receiver[1]]
        return frozen.flatten(-2)

    before = run(anatomy, inputs, keep)
    run(anatomy, copies, with_sender)
    after = run(anatomy, copies, with_receiver)
    (context, memory) = ids.tolist()
    return (before[:, context] - before[:, memory]) - (after[:, context] - after[:, memory])


def expected(model, examples, token_ids, senders, receiver, replacement, tokens):
    prompts = zip(examples, token_ids, replacement, strict=True)
    return torch.stack([brute_force(model, e.prompt, ids, senders, receiver, z, tokens) for e, ids, z in prompts])


@pytest.mark.parametrize("receiver", [(1, 0), (2, 1)])
def test_scores_equal_whole_forward_passes_in_every_architecture(tiny_bridge, receiver):
    conflicts = tiny_conflicts()
    anatomy = Anatomy(tiny_bridge)
    if receiver[0] >= anatomy.n_layers:
        receiver = (anatomy.n_layers - 1, receiver[1])
    examples, token_ids = scorable(tiny_bridge, conflicts)
    z = last_token_states(tiny_bridge, [e.prompt for e in examples]).z
    senders = [head for head in anatomy.heads if head[0] < receiver[0]]

    corrupted = head_to_head(tiny_bridge, conflicts, [(1, 0), receiver], name="tiny")[receiver]
    everywhere = head_to_head(tiny_bridge, conflicts, [receiver], name="tiny", baseline="zero", tokens="all")[receiver]

    for scores, replacement, tokens in (
        (corrupted, z[corrupted_partners(examples, 0)], slice(-1, None)),
        (everywhere, torch.zeros_like(z), slice(None)),
    ):
        found = torch.stack([scores.values[:, layer, head] for layer, head in senders], 1)
        by_hand = expected(tiny_bridge, examples, token_ids, senders, receiver, replacement, tokens)
        assert ((found - by_hand).norm() / by_hand.norm()).item() < 1e-3
        assert not scores.values[:, receiver[0] :].any()


def test_scores_equal_whole_forward_passes_on_the_real_model(smollm2, capital_conflicts):
    conflicts = ConflictSet("one", capital_conflicts.select(kind="conflict").examples[:1])
    examples, token_ids = scorable(smollm2, conflicts)
    receiver, senders = (18, 6), [(0, 0), (15, 8), (17, 4)]
    z = torch.zeros_like(last_token_states(smollm2, [e.prompt for e in examples]).z)

    scores = head_to_head(smollm2, conflicts, [receiver], name="smollm2", baseline="zero")[receiver]

    found = torch.stack([scores.values[:, layer, head] for layer, head in senders], 1)
    by_hand = expected(smollm2, examples, token_ids, senders, receiver, z, slice(-1, None))
    assert ((found - by_hand).norm() / by_hand.norm()).item() < 1e-3


def test_half_precision_scores_are_close_to_full_precision(tiny_directories):
    """What rounding does to a pass with a cache, and not to one without, is no effect of a sender."""
    half, full = (load_model(str(tiny_directories["llama"]), device="cpu", dtype=d) for d in ("bfloat16", "float32"))
    found, expected = (
        head_to_head(model, tiny_conflicts(), [(2, 1)], name="tiny", baseline="zero")[2, 1].values[:, :2].flatten()
        for model in (half, full)
    )
    assert torch.corrcoef(torch.stack([found, expected]))[0, 1] > 0.95


@pytest.mark.parametrize(
    ("receivers", "options", "message"),
    [
        ([], {}, "above layer 0"),
        ([(0, 1)], {}, "above layer 0"),
        ([(1, 99)], {}, "does not exist"),
        ([(1, 0)], {"baseline": "noise"}, "must be one of"),
        ([(1, 0)], {"tokens": "some"}, "must be one of"),
        ([(1, 0)], {"tokens": "all"}, "take zero"),
    ],
)
def test_what_cannot_be_scored_is_refused(tiny_llama, receivers, options, message):
    with pytest.raises(UserError, match=message):
        head_to_head(tiny_llama, tiny_conflicts(), receivers, name="tiny", **options)
