import json

import pytest

from interp.anatomy import BLUEPRINTS
from interp.blueprints import blueprint_from, register
from interp.errors import UserError

pytestmark = pytest.mark.usefixtures("architectures_are_left_as_they_were")


def written(folder, **record):
    path = folder / "mine.json"
    path.write_text(json.dumps(record))
    return path


# What the table itself says of each, written out and read back.
@pytest.mark.parametrize("name", ["OPTForCausalLM", "FalconForCausalLM", "Olmo2ForCausalLM", "GraniteForCausalLM"])
def test_a_blueprint_that_is_like_another_is_that_one(tmp_path, name):
    assert blueprint_from(written(tmp_path, architecture="Mine", like=name)) == ("Mine", BLUEPRINTS[name])


def test_fields_are_changed(tmp_path):
    fields = {"mlp_norm": None, "variants": [{"when": {"fast": True}, "fields": {"parallel": True}}]}
    _, found = blueprint_from(written(tmp_path, architecture="Mine", like="LlamaForCausalLM", fields=fields))
    assert found.mlp_norm is None
    assert found.variants[0].fields == {"parallel": True}
    assert found.query == BLUEPRINTS["LlamaForCausalLM"].query


def test_a_registered_architecture_is_known(tmp_path):
    from interp import blueprints

    assert register(written(tmp_path, architecture="Mine", like="LlamaForCausalLM")) == "Mine"
    assert blueprints.BLUEPRINTS["Mine"] == BLUEPRINTS["LlamaForCausalLM"]


def test_a_known_architecture_is_not_replaced(tmp_path):
    with pytest.raises(UserError, match=r"LlamaForCausalLM of .* is known already"):
        register(written(tmp_path, architecture="LlamaForCausalLM", like="OPTForCausalLM"))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"like": "LlamaForCausalLM"}, "does not name its architecture"),
        ({"architecture": "Mine", "like": "Nobody"}, "Nobody is not known; known are"),
        ({"architecture": "Mine", "looks": 1}, "unknown entry 'looks'; there are architecture, like, fields"),
        ({"architecture": "Mine", "fields": {"blocks": "layers"}}, "wrong field embedding"),
        ({"architecture": "Mine", "like": "LlamaForCausalLM", "fields": {"norm": "batch"}}, "wrong field norm"),
        ({"architecture": "Mine", "like": "LlamaForCausalLM", "fields": {"heads": 3}}, "unknown entry 'heads'"),
        (
            {
                "architecture": "Mine",
                "like": "LlamaForCausalLM",
                "fields": {"variants": [{"when": {}, "fields": {"mlp_post_norm": "norm"}}]},
            },
            "unknown entry 'mlp_post_norm'",
        ),
    ],
)
def test_a_wrong_file_is_refused_in_a_sentence(tmp_path, record, message):
    with pytest.raises(UserError, match=message):
        blueprint_from(written(tmp_path, **record))
