import json
from collections import Counter

import pytest
import torch

from interp.activation_store import ActivationStore
from interp.errors import UserError
from interp.sae import load_sae
from probes.sae_training import SAETraining, save_trained, settings_record, shuffled_batches, train_sae

SITE = "blocks.1.hook_out"
WORDS = ("Rome", "Paris", "Tokyo", "Italy", "France", "Japan", "is", "the", "capital", "of")


@pytest.fixture(scope="module")
def store(tiny_llama, tmp_path_factory):
    """All tokens of 120 texts of ten words in three shards."""
    generator = torch.Generator().manual_seed(0)
    texts = [" ".join(WORDS[i] for i in torch.randint(10, (10,), generator=generator)) for _ in range(120)]
    path = tmp_path_factory.mktemp("recorded") / "store"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("interp.activation_store.SHARD_PROMPTS", 40)
        return ActivationStore.record(path, tiny_llama, texts, [SITE], "all", name="tiny")


def settings(**changes):
    return SAETraining(**{"features": 48, "active": 4, "tokens": 16_000, "batch_size": 64, **changes})


def test_an_epoch_of_batches_holds_every_token_but_the_first_of_each_text_once(store):
    inner = torch.from_numpy(store.index["position"].to_numpy() > 0)
    expected = store.read(SITE)[inner]
    batches = shuffled_batches(store, SITE, 50, seed=0)
    count = len(expected) // 50
    found = torch.cat([next(batches) for _ in range(count)])
    # What is left over at the end of an epoch comes first in the next.
    assert len(found) == count * 50 <= len(expected)
    times, again = Counter(map(tuple, expected.tolist())), Counter(map(tuple, found.tolist()))
    assert again <= times


def test_batches_mix_shards_and_depend_on_the_seed_alone(store):
    first, again, other = (next(shuffled_batches(store, SITE, 64, seed)) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    shards = [values for values in store.shards(SITE)]
    sources = {i for row in first for i, values in enumerate(shards) if (values == row).all(-1).any()}
    assert len(sources) == len(shards) == 3


def test_a_recording_of_fewer_tokens_than_a_batch_is_refused(store):
    with pytest.raises(UserError, match="fewer tokens than one batch of 100000"):
        next(shuffled_batches(store, SITE, 100_000, 0))


@pytest.mark.parametrize("architecture", ["batchtopk", "topk", "jumprelu", "standard"])
def test_training_explains_most_of_the_variance_with_few_features(store, tmp_path, architecture):
    """Each architecture, against the mean: what is explained is measured here, on what was saved."""
    sae = train_sae(store, SITE, settings(architecture=architecture, learning_rate=3e-3, l1=1.0), device="cpu")
    save_trained(sae, tmp_path / "sae")
    loaded = load_sae(tmp_path / "sae")
    assert loaded.architecture == {"batchtopk": "jumprelu"}.get(architecture, architecture)
    assert (loaded.layer, loaded.d_in, loaded.d_sae) == (1, 32, 48)
    x = store.read(SITE)[torch.from_numpy(store.index["position"].to_numpy() > 0)]
    z = loaded.encode(x)
    active = (z != 0).float().sum(-1).mean().item()
    assert 1 <= active <= 24
    if architecture in ("topk", "batchtopk"):
        assert active == pytest.approx(4, abs=1.5)
        assert sae.cfg.aux_loss_coefficient == 1 / 32
    left = (x - loaded.reconstruct(x)).square().sum() / (x - x.mean(0)).square().sum()
    assert left < 0.4


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(store):
    short = {"tokens": 64 * 20}
    first, again = (train_sae(store, SITE, settings(**short), device="cpu").W_enc for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, train_sae(store, SITE, settings(**short, seed=1), device="cpu").W_enc)


def test_what_is_saved_is_bfloat16_and_reads_in_sae_lens_as_in_our_runtime(store, tmp_path):
    from sae_lens import SAE

    save_trained(train_sae(store, SITE, settings(tokens=64 * 20), device="cpu"), tmp_path / "sae")
    theirs, ours = SAE.load_from_disk(tmp_path / "sae", dtype="float32"), load_sae(tmp_path / "sae")
    assert json.loads((tmp_path / "sae" / "cfg.json").read_text())["dtype"] == "bfloat16"
    x = store.read(SITE)[:200]
    torch.testing.assert_close(ours.encode(x), theirs.encode(x).detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.reconstruct(x), theirs(x).detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"active": 48}, "48 active of 48 features"),
        ({"tokens": 100}, "fewer than 20 steps of 64"),
        ({"learning_rate": 0.0}, "learning rate is a number above 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        settings(**changes)


def test_the_record_of_settings_names_only_what_was_used():
    assert "l1" not in settings_record(settings())
    assert not {"active", "auxiliary"} & set(settings_record(settings(architecture="standard")))
    assert "auxiliary" not in settings_record(settings(architecture="jumprelu"))
    assert settings_record(settings())["auxiliary"] == 1 / 32


def test_a_site_that_was_not_recorded_is_an_error(store):
    with pytest.raises(UserError, match=r"blocks\.2\.hook_out' was not recorded"):
        train_sae(store, "blocks.2.hook_out", settings(), device="cpu")
