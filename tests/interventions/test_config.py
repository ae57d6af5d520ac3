import json

import pytest
import torch

from interp.errors import UserError
from interp.generation import encode
from interp.models import load_model
from interventions.base import applied
from interventions.config import HeadScalingEntry, InterventionFile, ModelShape
from interventions.heads import HeadScaling, ScaledHead

SCALING = HeadScaling((ScaledHead(0, 1, 0.0), ScaledHead(2, 3, -1.5, tuple(0.1 * i for i in range(8)))))


@pytest.fixture
def file(tiny_llama):
    return InterventionFile.of(
        [SCALING],
        name="test",
        towards="context",
        model=ModelShape.of(tiny_llama, "tiny"),
        measured={"context_rate": 0.5},
    )


def test_a_saved_file_loads_as_it_was(file, tmp_path):
    file.save(tmp_path / "edit.json")
    again = InterventionFile.load(tmp_path / "edit.json")
    assert again == file
    assert again.build() == [SCALING]


def test_a_loaded_file_does_what_the_intervention_did(file, tiny_llama, tmp_path):
    file.save(tmp_path / "edit.json")
    batch = encode(tiny_llama, ["The capital of France is"])
    with torch.inference_mode():
        with applied(tiny_llama, SCALING):
            expected = tiny_llama.original_model(**batch).logits
        with applied(tiny_llama, InterventionFile.load(tmp_path / "edit.json")):
            assert torch.equal(tiny_llama.original_model(**batch).logits, expected)


@pytest.mark.parametrize("architecture", ["mistral", "gpt2"])
def test_a_file_for_another_model_is_refused(file, tiny_directories, architecture):
    other = load_model(str(tiny_directories[architecture]), device="cpu")
    with pytest.raises(UserError, match=r"is for tiny \(architecture LlamaForCausalLM\)"):
        file.attach(other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(format="something"), 'its "format" must be'),
        (lambda r: r.update(version=2), "has version 2, this conflictscope reads version 1"),
        (lambda r: r.update(surprise=1), "surprise"),
        (lambda r: r.pop("model"), "model"),
        (lambda r: r.update(interventions=[]), "interventions"),
        (lambda r: r["interventions"][0].update(kind="lobotomy"), "kind"),
        (lambda r: r["interventions"][0]["heads"][0].update(scale="0"), "scale"),
        (lambda r: r["interventions"][0]["heads"][0].update(scale=float("nan")), "scale"),
        (lambda r: r["interventions"][0]["heads"][0].update(scale=float("inf")), "scale"),
        (lambda r: r["interventions"][0]["heads"][0].update(layer=-1), "layer"),
        (lambda r: r["interventions"][0]["heads"][0].update(layer=True), "layer"),
        (
            lambda r: r["interventions"][0]["heads"].append(r["interventions"][0]["heads"][0]),
            r"Head 0\.1 is listed twice",
        ),
        (lambda r: r["model"].update(n_layers=0), "n_layers"),
    ],
)
def test_a_file_that_says_anything_else_is_refused(file, tmp_path, change, message):
    record = json.loads(file.model_dump_json())
    change(record)
    (tmp_path / "edit.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=message):
        InterventionFile.load(tmp_path / "edit.json")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"null", b"[" * 100_000])
def test_a_file_that_is_not_a_record_is_refused(tmp_path, content):
    (tmp_path / "edit.json").write_bytes(content)
    with pytest.raises(UserError):
        InterventionFile.load(tmp_path / "edit.json")


def test_a_file_of_which_one_entry_does_not_fit_leaves_nothing_attached(file, tiny_llama):
    misfit = HeadScalingEntry.of(HeadScaling.of([(9, 0)], 0.0))
    two = file.model_copy(update={"interventions": [*file.interventions, misfit]})
    batch = encode(tiny_llama, ["The capital of France is"])
    with torch.inference_mode():
        before = tiny_llama.original_model(**batch).logits
        with pytest.raises(UserError, match="Layer 9 does not exist"):
            two.attach(tiny_llama)
        assert torch.equal(tiny_llama.original_model(**batch).logits, before)


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(UserError, match="Could not read the intervention file"):
        InterventionFile.load(tmp_path / "none.json")
