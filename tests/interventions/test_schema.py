import json
from pathlib import Path

import jsonschema
import pytest
import torch

import interventions
from interventions.config import InterventionFile, json_schema
from interventions.dial import DialPoint, DialScale, TrustDial
from interventions.feedforward import FeedForwardScaling
from interventions.gate import ConflictGate
from interventions.heads import HeadScaling, ScaledHead
from interventions.identity import ModelIdentity
from interventions.steering import Steering
from tests.interventions.test_config import feature_edit

PUBLISHED = Path(interventions.__file__).parent / "schema.json"


@pytest.fixture
def record(tiny_llama, tmp_path):
    """A document with every kind of intervention."""
    parts = [
        HeadScaling((ScaledHead(0, 1, 0.0), ScaledHead(2, 3, -1.5, tuple(0.1 * i for i in range(8))))),
        FeedForwardScaling(((1, 0.5),)),
        TrustDial((DialScale(0, 1, 0.5, 2.0), DialScale(2, None)), 0.5, (DialPoint(0.0, 0.5, 0.5),)),
        Steering(1, torch.ones(32)),
        feature_edit(tmp_path, "jumprelu"),
        ConflictGate("mlp", 0, torch.ones(32), 0.0, 1.0, (HeadScaling.of([(1, 0)], 0.0),)),
    ]
    InterventionFile.of(parts, name="all", model=ModelIdentity.of(tiny_llama, "tiny")).save(tmp_path / "all.json")
    return json.loads((tmp_path / "all.json").read_text())


def test_the_published_schema_is_the_one_that_files_are_checked_with():
    assert json.loads(PUBLISHED.read_text(encoding="utf-8")) == json_schema(), "run: make schema"


def test_a_saved_file_obeys_the_schema(record):
    jsonschema.Draft202012Validator.check_schema(json_schema())
    jsonschema.validate(record, json_schema())


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r.pop("model"),
        lambda r: r.pop("format"),
        lambda r: r.pop("version"),
        lambda r: r["interventions"][0].pop("kind"),
        lambda r: r["interventions"][5]["interventions"][0].pop("kind"),
        lambda r: r.update(version=4),
        lambda r: r.update(surprise=1),
        lambda r: r.update(interventions=[]),
        lambda r: r["interventions"][0].update(kind="lobotomy"),
        lambda r: r["interventions"][0]["heads"][0].update(scale="0"),
        lambda r: r["interventions"][0]["heads"][0].update(scale=1e5),
        lambda r: r["interventions"][0]["heads"][0].update(layer=-1),
        lambda r: r["interventions"][5]["interventions"].append(r["interventions"][5]),
        lambda r: r["tensors"].update(file="../all.safetensors"),
        lambda r: r["tensors"].update(sha256="0"),
    ],
)
def test_what_is_wrong_does_not_obey_it(record, change):
    change(record)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(record, json_schema())
