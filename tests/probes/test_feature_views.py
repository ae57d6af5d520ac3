import json
from types import SimpleNamespace
from typing import Any

import polars as pl
import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from interp.anatomy import Anatomy
from interp.errors import UserError
from interp.sae import SparseAutoencoder
from interp.statistics import bootstrap_mean
from probes.feature_views import view_features, visible_token

# Logits of a direction


def test_logits_of_a_direction_are_the_derivative_of_the_models_own(tiny_bridge: Any) -> None:
    """Along a direction across the residual stream the norm's scale stands still."""
    anatomy = Anatomy(tiny_bridge)
    plain: Any = AutoModelForCausalLM.from_pretrained(tiny_bridge.original_model.config._name_or_path)
    norm, head = plain.get_submodule(anatomy.blueprint.final_norm), plain.get_output_embeddings()
    generator = torch.Generator().manual_seed(0)
    residual, direction = 100 * torch.randn(2, anatomy.d_model, generator=generator)
    residual = residual - residual.mean()
    direction = direction - direction @ residual / residual.square().sum() * residual
    derivative = torch.func.jvp(lambda x: head(norm(x)), (residual,), (direction,))[1]
    expected = derivative * residual.square().mean().sqrt()
    found = anatomy.direction_logits(direction)
    torch.testing.assert_close(found, expected - expected.mean(), rtol=1e-4, atol=1e-4)


def test_logits_of_directions_keep_leading_dimensions(tiny_llama: Any) -> None:
    anatomy = Anatomy(tiny_llama)
    directions = torch.randn(2, 3, anatomy.d_model, generator=torch.Generator().manual_seed(0))
    found = anatomy.direction_logits(directions)
    assert found.shape == (2, 3, anatomy.d_vocab)
    torch.testing.assert_close(found[1, 2], anatomy.direction_logits(directions[1, 2]))


def test_logits_of_a_direction_are_float32_and_have_mean_0(tiny_llama: Any) -> None:
    found = Anatomy(tiny_llama).direction_logits(torch.ones(32, dtype=torch.bfloat16))
    assert found.dtype == torch.float32
    assert found.mean().item() == pytest.approx(0, abs=1e-5)


# Views of features


def identity_sae(width: int = 32) -> SparseAutoencoder:
    """Feature i is the i-th number of the residual stream where it is positive."""
    weights = {"W_enc": torch.eye(width), "W_dec": torch.eye(width), "b_enc": torch.zeros(width)}
    return SparseAutoencoder("standard", weights | {"b_dec": torch.zeros(width)}, layer=1, name="identity")


ACTIVATIONS = [3.0, 0.0, 5.0, -1.0, 5.0, 2.0, 7.0]
INDEX = pl.DataFrame(
    {
        "subject": ["Italy", "Italy", "Japan", "Japan", "Peru", "Peru", "Chad"],
        "relation": ["capital"] * 7,
        "template": ["note", "passage"] * 3 + ["note"],
        "text": [f"prompt {i}" for i in range(7)],
        "usage": ["memory", "memory", "context", "context", "context", "both", None],
    }
)


def states() -> Tensor:
    """Feature 4 has the activations above, feature 5 is dead."""
    values = torch.randn(7, 32, generator=torch.Generator().manual_seed(0))
    values[:, 4], values[:, 5] = torch.tensor(ACTIVATIONS), -1
    return values


def test_prompts_are_those_that_activate_most_and_equal_ones_stay_in_order(tiny_llama: Any) -> None:
    (view,) = view_features(tiny_llama, identity_sae(), [4], states(), INDEX, n_prompts=4)
    assert view.prompts.columns == ["activation", "usage", "relation", "template", "text"]
    assert view.prompts.rows() == [
        (7.0, None, "capital", "note", "prompt 6"),
        (5.0, "context", "capital", "note", "prompt 2"),
        (5.0, "context", "capital", "note", "prompt 4"),
        (3.0, "memory", "capital", "note", "prompt 0"),
    ]


def test_prompts_for_which_a_feature_does_not_fire_are_not_shown(tiny_llama: Any) -> None:
    (view,) = view_features(tiny_llama, identity_sae(), [4], states(), INDEX)
    assert view.prompts["activation"].to_list() == [7, 5, 5, 3, 2]


def test_frequency_is_the_share_of_all_prompts(tiny_llama: Any) -> None:
    fires, dead = view_features(tiny_llama, identity_sae(), [4, 5], states(), INDEX)
    assert (fires.frequency, dead.frequency) == (pytest.approx(5 / 7), 0)
    assert dead.prompts.is_empty()


def test_sources_are_those_of_judged_prompts_with_intervals_by_subject(tiny_llama: Any) -> None:
    (view,) = view_features(tiny_llama, identity_sae(), [4], states(), INDEX)
    context = bootstrap_mean([5.0, 0.0, 5.0], ["Japan", "Japan", "Peru"])
    expected = [
        ("memory", 2, 0.5, 1.5, 1.5, 1.5),
        ("context", 3, 2 / 3, 10 / 3, context.low, context.high),
        ("both", 1, 1.0, 2.0, 2.0, 2.0),
    ]
    assert view.by_source.columns == ["usage", "prompts", "frequency", "mean", "low", "high"]
    for found, row in zip(view.by_source.rows(), expected, strict=True):
        assert found == (row[0], *(pytest.approx(number) for number in row[1:]))


def test_tokens_are_those_that_the_decoder_direction_moves_most(tiny_llama: Any) -> None:
    (view,) = view_features(tiny_llama, identity_sae(), [4], states(), INDEX, n_tokens=3)
    plain = tiny_llama.original_model
    column = plain.lm_head.weight[:, 4] * plain.model.norm.weight[4]
    effects = (column - column.mean()).tolist()
    order = sorted(range(len(effects)), key=lambda i: effects[i])
    for frame, ids in ((view.promoted, order[:-4:-1]), (view.suppressed, order[:3])):
        assert frame["token"].to_list() == [visible_token(tiny_llama.tokenizer, i) for i in ids]
        assert frame["effect"].to_list() == pytest.approx([effects[i] for i in ids], rel=1e-4)


def test_rows_of_a_padded_unembedding_are_no_tokens(tiny_llama: Any) -> None:
    tokenizer = tokenizer_of(["a", "b", "c"], decoders.ByteLevel())
    padded: Any = SimpleNamespace(original_model=tiny_llama.original_model, tokenizer=tokenizer)
    (view,) = view_features(padded, identity_sae(), [4], states(), INDEX)
    assert sorted(view.promoted["token"]) == ["a", "b", "c"]


def test_views_come_in_the_order_asked_for(tiny_llama: Any) -> None:
    views = view_features(tiny_llama, identity_sae(), [9, 4], states(), INDEX)
    assert [(view.layer, view.feature) for view in views] == [(1, 9), (1, 4)]
    assert views[1].prompts["activation"].max() == 7


def test_a_view_is_a_record_that_json_knows(tiny_llama: Any) -> None:
    (view,) = view_features(tiny_llama, identity_sae(), [4], states(), INDEX, n_prompts=1, n_tokens=2)
    record = json.loads(json.dumps(view.to_record(), allow_nan=False))
    assert (record["layer"], record["feature"], record["frequency"]) == (1, 4, pytest.approx(5 / 7))
    assert record["prompts"] == [
        {"activation": 7.0, "usage": None, "relation": "capital", "template": "note", "text": "prompt 6"}
    ]
    assert [row["usage"] for row in record["by_source"]] == ["memory", "context", "both"]
    assert [set(row) for row in record["promoted"] + record["suppressed"]] == [{"token", "effect"}] * 4


def test_a_feature_outside_the_autoencoder_is_refused(tiny_llama: Any) -> None:
    with pytest.raises(UserError, match="identity has no feature 32; its features are 0 to 31"):
        view_features(tiny_llama, identity_sae(), [32], states(), INDEX)


def test_states_and_index_of_different_length_are_refused(tiny_llama: Any) -> None:
    with pytest.raises(UserError, match="7 states for 6 rows"):
        view_features(tiny_llama, identity_sae(), [4], states(), INDEX.head(6))


def test_states_of_another_width_are_refused(tiny_llama: Any) -> None:
    with pytest.raises(UserError, match=r"identity reads 32 numbers a prompt; give those of blocks\.1\.hook_out"):
        view_features(tiny_llama, identity_sae(), [4], states()[:, :8], INDEX)


@pytest.mark.parametrize("column", ["subject", "usage", "template"])
def test_an_index_without_a_column_is_refused(tiny_llama: Any, column: str) -> None:
    with pytest.raises(UserError, match=f"no column {column}: .* conflict prompts with answers"):
        view_features(tiny_llama, identity_sae(), [4], states(), INDEX.drop(column))


@pytest.mark.parametrize("kind", [pl.String, pl.Null])
def test_an_index_without_any_judged_answer_is_refused(tiny_llama: Any, kind: Any) -> None:
    with pytest.raises(UserError, match="which source its answer used"):
        view_features(tiny_llama, identity_sae(), [4], states(), INDEX.with_columns(usage=pl.lit(None, dtype=kind)))


# Visible tokens


def tokenizer_of(pieces: list[str], decoder: Any) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token=pieces[0]))
    tokenizer.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize(
    ("piece", "shown"),
    [
        ("Paris", "Paris"),
        ("ĠParis", "␣Paris"),
        ("Ġ.", "␣."),
        ("Ċ", "↵"),
        ("ĉĠ", "⇥␣"),
        ("Ã©", "é"),
        ("Ã", "Ã"),  # the first of two bytes
        ("Ā", "\\x00"),
    ],
)
def test_tokens_of_bytes_show_their_spaces_and_controls(piece: str, shown: str) -> None:
    assert visible_token(tokenizer_of([piece], decoders.ByteLevel()), 0) == shown


def test_tokens_of_sentencepiece_keep_their_leading_space() -> None:
    tokenizer = tokenizer_of(["x", "▁Paris", "Paris"], decoders.Metaspace())
    assert [visible_token(tokenizer, i) for i in (1, 2)] == ["␣Paris", "Paris"]


def test_a_number_that_is_no_token_is_shown_as_a_number() -> None:
    assert visible_token(tokenizer_of(["x"], decoders.ByteLevel()), 5) == "[5]"
