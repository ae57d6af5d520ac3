"""How vLLM is started, and which adapter a name stands for; the engine itself is asked in tests/engines."""

import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from conflictscope.serve.settings import at_setting, find
from conflictscope.serve.vllm import Served, check_installed, command, write_edits
from interp.errors import UserError
from interp.models import load_checkpoint
from interventions.config import InterventionFile
from interventions.dial import DialScale, TrustDial
from interventions.export.lora import write_adapters
from interventions.identity import ModelIdentity
from tests.interventions.test_lora import DIAL, PRUNED

BASE = "base"
MORE = ["../adapters/pruned", "..@0.5", ".@0.5", "dial@.5", "dial@5e-1", "x" * 300, "dial@0.5000000001"]
HERE = Served("tiny", "tiny", "float32", "127.0.0.1", 8000, "secret", sys.executable, ("--enforce-eager",))


@pytest.fixture(scope="module")
def files(tiny_directories):
    folder = str(tiny_directories["llama"])
    identity = ModelIdentity.of(load_checkpoint(folder)[0], folder, AutoTokenizer.from_pretrained(folder))
    edits = {"dial": DIAL, "pruned": PRUNED}
    return folder, {name: InterventionFile.of([edit], name=name, model=identity) for name, edit in edits.items()}


@pytest.fixture(scope="module")
def adapters(files, tmp_path_factory):
    folder, named = files
    out = tmp_path_factory.mktemp("served") / "adapters"
    assert write_edits(folder, named, out, ["What?"]) == ["dial@1", "dial@-1", "pruned", "none"]
    # As the page of a base on a hub would be called.
    for path in out.glob("*/adapter_config.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": BASE}))
    return out


def config(folder):
    return json.loads((folder / "adapter_config.json").read_text())


@pytest.mark.parametrize(
    ("name", "folder", "share"),
    [
        ("dial@0.5", "dial@1", 0.5),
        ("dial@-0.25", "dial@-1", 0.25),
        ("dial@1", "dial@1", 1.0),
        ("dial@0", "dial@1", 0.0),
        ("pruned", "pruned", 1.0),
        ("pruned@0.5", "pruned", 0.5),
        ("pruned@-2", "pruned", -2.0),
        ("none", "none", 1.0),
    ],
)
def test_names_stand_for_settings(adapters, tmp_path, name, folder, share):
    found = find(adapters, name, BASE)
    assert found is not None
    assert (found.folder.name, found.share) == (folder, share)
    written = at_setting(found, tmp_path / "settings" / name)
    assert config(written) == {
        **config(adapters / folder),
        "lora_alpha": share * config(adapters / folder)["lora_alpha"],
    }
    tensors = "adapter_model.safetensors"
    assert (written / tensors).read_bytes() == (adapters / folder / tensors).read_bytes()


@pytest.mark.parametrize(
    "name", ["dial@2", "dial@nan", "dial@inf", "dial@", "@1", "dial", "other", "pruned@1e9", "", "..", *MORE]
)
def test_other_names_stand_for_nothing(adapters, name):
    assert find(adapters, name, BASE) is None


def test_the_command_has_the_flags_that_the_adapters_need(files, adapters, monkeypatch):
    monkeypatch.setattr("conflictscope.serve.vllm.checkpoint_source", lambda name: f"/models/{name}")
    line = command(HERE, adapters, ["dial@1", "dial@-1", "pruned", "none"])
    options = dict(itertools.pairwise(line))
    assert options["--model"] == "/models/tiny"
    assert options["--max-lora-rank"] == "16"
    # One slot stays free.
    assert options["--max-loras"] == "5"
    assert options["--lora-target-modules"] == "o_proj"
    # In the environment: arguments can be listed by others.
    assert "secret" not in line
    assert f"none={(adapters / 'none').resolve()}" in line
    assert line[-1] == "--enforce-eager"


def test_adapters_that_are_there_are_taken_and_others_are_not_replaced(files, adapters, monkeypatch):
    folder, named = files
    monkeypatch.setattr("conflictscope.serve.vllm.checkpoint_source", lambda _: BASE)
    before = {path: path.stat().st_mtime_ns for path in adapters.rglob("*")}
    write_edits(folder, named, adapters, [])
    assert {path: path.stat().st_mtime_ns for path in adapters.rglob("*")} == before
    with pytest.raises(UserError, match="holds another edit"):
        write_edits(folder, {"pruned": named["pruned"].scaled(0.5)}, adapters, [])
    monkeypatch.setattr("conflictscope.serve.vllm.checkpoint_source", lambda _: "other")
    with pytest.raises(UserError, match="for another base"):
        write_edits(folder, {"more": named["pruned"]}, adapters, [])


def test_names_that_are_taken_and_options_that_are_set_are_refused(files, adapters, tmp_path):
    folder, named = files
    for name in ("none", Path(folder).name, "a=b"):
        with pytest.raises(UserError, match="cannot be called"):
            write_edits(folder, {name: named["pruned"]}, tmp_path / "new", [])
    with pytest.raises(UserError, match="--host is set by ConflictScope's own options"):
        command(replace(HERE, options=("--host=0.0.0.0",)), adapters, ["pruned"])


def test_adapters_of_other_bases_and_edits_of_several_parts_have_no_settings(files, adapters, tmp_path):
    folder, named = files
    assert find(adapters, "pruned", "another") is None
    both = InterventionFile.of([PRUNED, DIAL], name="both", model=named["dial"].model)
    for name, file, trusts in (("both", both, (1.0,)), ("turned", named["dial"], (-0.5,))):
        write_adapters(folder, file, tmp_path / (f"{name}@1" if name == "both" else name), name=name, trusts=trusts)
    assert find(tmp_path, "both@1", folder) is not None
    for name in ("both@0.5", "turned@0.5", "turned@-1"):
        assert find(tmp_path, name, folder) is None
    # Where nothing was written for it, any adapter goes no way at all.
    assert find(tmp_path, "none", folder) == (tmp_path / "both@1", 0.0)


def test_the_adapter_called_none_changes_nothing(adapters):
    assert config(adapters / "none")["lora_alpha"] == 0
    assert config(adapters / "none")["r"] == 1


def test_a_rank_above_the_cap_and_edits_that_do_nothing_are_refused(files, adapters, monkeypatch, tmp_path):
    monkeypatch.setattr("interventions.export.lora.VLLM_RANKS", (1, 8))
    with pytest.raises(UserError, match=r"dial@1 has rank 16.*--max-heads-per-layer"):
        command(HERE, adapters, ["dial@-1", "dial@1"])
    folder, named = files
    idle = InterventionFile.of([TrustDial((DialScale(0, 0),))], name="idle", model=named["dial"].model)
    with pytest.raises(UserError, match="changes nothing"):
        write_edits(folder, {"idle": idle}, tmp_path / "none", [])


def test_an_environment_without_vllm_is_told(tmp_path):
    with pytest.raises(UserError, match="vLLM is not installed"):
        check_installed(sys.executable)
    for program in (str(tmp_path / "python"), "true"):
        with pytest.raises(UserError, match="no interpreter that runs"):
            check_installed(program)
