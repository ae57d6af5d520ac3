import math

import pytest
import torch
from safetensors import safe_open

from interp.errors import UserError
from interp.files import assets_directory
from interp.sae import SparseAutoencoder, load_saes
from probes.sae_quality import evaluate_saes

TEXTS = ["The capital of France is Paris", "Rome is the capital of Italy and Tokyo of Japan", "Lima is in Peru"]
LAYER = 1
D = 32


def identity(layer=LAYER):
    """x = relu(x) - relu(-x): an autoencoder that loses nothing."""
    eye = torch.eye(D)
    weights = {
        "W_enc": torch.cat([eye, -eye], 1),
        "W_dec": torch.cat([eye, -eye]),
        "b_enc": torch.zeros(2 * D),
        "b_dec": torch.zeros(D),
    }
    return SparseAutoencoder("standard", weights, layer)


def random_sae(seed=0, n_features=40):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    weights = {
        "W_enc": draw(D, n_features),
        "W_dec": draw(n_features, D) / 8,
        "b_enc": draw(n_features),
        "b_dec": draw(D),
    }
    return SparseAutoencoder("standard", weights, LAYER)


def one_by_one(model, replacement):
    """Summed loss over the tokens after the first, and greedy next token, of each text alone, by a hook of our own."""
    losses, tokens = [], []
    block = model.original_model.get_submodule(f"model.layers.{LAYER}")
    for text in TEXTS:
        ids = model.tokenizer(text, return_tensors="pt")["input_ids"]

        def hook(_module, _inputs, output):
            x = output[0] if isinstance(output, tuple) else output
            y = torch.cat([x[:, :1], replacement(x[:, 1:])], 1)
            return (y, *output[1:]) if isinstance(output, tuple) else y

        handle = block.register_forward_hook(hook)
        with torch.inference_mode():
            logits = model.original_model(ids).logits[0]
        handle.remove()
        chosen = logits.log_softmax(-1)[:-1].gather(-1, ids[0, 1:, None])
        losses.append(-chosen.sum().item())
        tokens.append((logits[-1].argmax().item(), len(ids[0]) - 1))
    return losses, tokens


def test_an_autoencoder_that_loses_nothing_costs_nothing(tiny_llama):
    (quality,) = evaluate_saes(tiny_llama, [identity()], TEXTS, batch_size=2)
    assert quality.explained_variance == pytest.approx(1, abs=1e-6)
    assert quality.loss_recovered == pytest.approx(1, abs=1e-4)
    assert quality.loss_increase.value == pytest.approx(0, abs=1e-5)
    assert quality.same_next_token.value == 1
    # Every number is positive or negative, so half of the features fire.
    assert quality.active == pytest.approx(D)


def test_losses_equal_those_of_each_text_alone_with_a_hook_of_our_own(tiny_llama):
    sae = random_sae()
    (quality,) = evaluate_saes(tiny_llama, [sae], TEXTS, batch_size=2)
    clean, next_clean = one_by_one(tiny_llama, lambda x: x)
    spliced, next_spliced = one_by_one(
        tiny_llama,
        lambda x: (
            ((x - sae.weights["b_dec"]) @ sae.weights["W_enc"] + sae.weights["b_enc"]).relu() @ sae.weights["W_dec"]
            + sae.weights["b_dec"]
        ),
    )
    ablated, _ = one_by_one(tiny_llama, torch.zeros_like)
    counts = [count for _, count in next_clean]
    assert quality.tokens == sum(counts)
    assert quality.loss == pytest.approx(sum(clean) / sum(counts), rel=1e-4)
    assert quality.loss_spliced == pytest.approx(sum(spliced) / sum(counts), rel=1e-4)
    assert quality.loss_ablated == pytest.approx(sum(ablated) / sum(counts), rel=1e-4)
    recovered = (sum(ablated) - sum(spliced)) / (sum(ablated) - sum(clean))
    assert quality.loss_recovered == pytest.approx(recovered, rel=1e-3)
    increases = [(s - c) / n for s, c, n in zip(spliced, clean, counts, strict=True)]
    assert quality.loss_increase.value == pytest.approx(math.fsum(increases) / 3, rel=1e-3)
    assert quality.same_next_token.value == sum(a == b for a, b in zip(next_clean, next_spliced, strict=True)) / 3


def test_variance_sparsity_and_dead_features_by_hand(tiny_llama):
    sae = random_sae()
    dead = dict(sae.weights, b_enc=sae.weights["b_enc"].clone())
    dead["b_enc"][:7] = -1e4
    sae = SparseAutoencoder("standard", dead, LAYER)
    seen = []
    block = tiny_llama.original_model.get_submodule(f"model.layers.{LAYER}")
    handle = block.register_forward_hook(
        lambda _m, _i, out: seen.append((out[0] if isinstance(out, tuple) else out)[0, 1:])
    )
    with torch.inference_mode():
        for text in TEXTS:
            tiny_llama.original_model(tiny_llama.tokenizer(text, return_tensors="pt")["input_ids"])
    handle.remove()
    x = torch.cat(seen)
    (quality,) = evaluate_saes(tiny_llama, [sae], TEXTS, batch_size=3)
    z = ((x - dead["b_dec"]) @ dead["W_enc"] + dead["b_enc"]).relu()
    error = (x - z @ dead["W_dec"] - dead["b_dec"]).square().sum()
    assert quality.active == pytest.approx((z > 0).float().sum(-1).mean().item(), rel=1e-5)
    assert quality.dead_features == int((z == 0).all(0).sum()) >= 7
    variance = (x - x.mean(0)).square().sum()
    assert quality.explained_variance == pytest.approx(1 - (error / variance).item(), rel=1e-3)


def test_several_autoencoders_are_measured_as_each_alone(tiny_llama):
    saes = [identity(0), random_sae(1)]
    together = evaluate_saes(tiny_llama, saes, TEXTS)
    assert together == [evaluate_saes(tiny_llama, [sae], TEXTS)[0] for sae in saes]


def test_the_model_is_left_as_it_was(tiny_llama):
    ids = tiny_llama.tokenizer(TEXTS[0], return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        before = tiny_llama.original_model(ids).logits
        evaluate_saes(tiny_llama, [random_sae()], TEXTS)
        assert torch.equal(tiny_llama.original_model(ids).logits, before)


def test_a_text_of_one_token_and_an_autoencoder_of_another_width_are_refused(tiny_llama):
    with pytest.raises(UserError, match="fewer than two tokens"):
        evaluate_saes(tiny_llama, [identity()], [*TEXTS, tiny_llama.tokenizer.decode([5])])
    narrow = SparseAutoencoder(
        "standard",
        {"W_enc": torch.ones(8, 4), "W_dec": torch.ones(4, 8), "b_enc": torch.zeros(4), "b_dec": torch.zeros(8)},
        LAYER,
    )
    with pytest.raises(UserError, match="reads 8 numbers"):
        evaluate_saes(tiny_llama, [narrow], TEXTS)


# What the package ships


@pytest.fixture(scope="module")
def shipped():
    return load_saes("smollm2-135m")


def test_shipped_autoencoders_are_four_or_more_in_bfloat16_and_at_most_60_mib(shipped):
    files = list((assets_directory() / "saes" / "smollm2-135m").rglob("*"))
    assert len(shipped) >= 4
    assert sum(path.stat().st_size for path in files if path.is_file()) <= 60 * 2**20
    for path in files:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as tensors:
                assert {tensors.get_tensor(name).dtype for name in tensors.keys()} == {torch.bfloat16}  # noqa: SIM118


def test_shipped_autoencoders_are_of_the_default_model_and_nearly_as_good_as_their_cards_on_other_prompts(
    shipped, smollm2, capital_conflicts
):
    prompts = [example.prompt for example in capital_conflicts.select(kind="conflict", templates=["question"])]
    for sae in shipped:
        sae.check(smollm2)
    for sae, quality in zip(shipped, evaluate_saes(smollm2, shipped, prompts), strict=True):
        card = sae.card["quality"]["conflict_prompts"]
        assert quality.explained_variance == pytest.approx(card["explained_variance"], abs=0.15)
        assert quality.loss_recovered > 0.9


def test_shipped_autoencoders_are_refused_for_another_model(shipped, tiny_llama):
    with pytest.raises(UserError, match="layers 0 to 2"):
        shipped[0].check(tiny_llama)
