"""The tokens of a real vLLM against hooks: alone, 32 at once, five edits mixed, and what goes wrong silently elsewhere.

`make engines` runs this alone, since it needs that engine: CONFLICTSCOPE_VLLM_PYTHON names the interpreter of an
environment with vLLM and, without its dependencies, ConflictScope.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from conflictscope.cli.verify import recorded
from interp.errors import UserError
from interp.models import load_model
from interventions.config import InterventionFile
from interventions.dial import DialScale, TrustDial
from interventions.export.server import Server
from interventions.export.verify import Edit, answers, edits_in, expected, verified
from interventions.heads import HeadScaling
from interventions.identity import ModelIdentity

PYTHON = os.environ["CONFLICTSCOPE_VLLM_PYTHON"]
MODEL, TOKENS = "smollm2-135m", 12
OPTIONS = "--enforce-eager --max-model-len 512"


# Heads that path patching finds in SmolLM2, those of the context and those of memory.
CONTEXT, MEMORY = [(23, 0), (23, 1), (23, 2), (23, 7)], [(23, 4), (24, 4), (29, 0)]
EDITS = {
    "dial": TrustDial(
        (
            *(DialScale(*head, memory=0.2, context=1.8) for head in CONTEXT),
            *(DialScale(*head, memory=1.8, context=0.2) for head in MEMORY),
        )
    ),
    "pruned": HeadScaling.of(MEMORY, 0.0),
    "turned": HeadScaling.of(CONTEXT, -0.5),
}
NAMES = ["none", "dial@1", "dial@-1", "dial@0.5", "pruned", "turned"]


@pytest.fixture(scope="module")
def model() -> Any:
    return load_model(MODEL, device="cpu", attention=None)


@pytest.fixture(scope="module")
def files(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    identity = ModelIdentity.of(model, MODEL)
    for name, edit in EDITS.items():
        InterventionFile.of([edit], name=name, model=identity).save(folder / f"{name}.json")
    return folder


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    return tmp_path_factory.mktemp("served") / "adapters"


@pytest.fixture(scope="module")
def served(files, adapters):
    """A server that was started by the command, and its process."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    configs = [str(files / f"{name}.json") for name in EDITS]
    engine = ["--engine", "vllm", "--vllm-python", PYTHON, "--adapters", str(adapters), "--vllm-options", OPTIONS]
    command = [sys.executable, "-m", "conflictscope", "serve", *configs, *engine, "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            assert process.poll() is None, "the server has ended"
            try:
                yield Server(url), process
                break
            except UserError:
                time.sleep(1)
        else:
            pytest.fail("the server did not start within ten minutes")
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(120)


@pytest.fixture(scope="module")
def prompts():
    return recorded(None)


@pytest.fixture(scope="module")
def truth(model, files, prompts):
    """What hooks answer, by the names that requests choose."""
    named = {name: InterventionFile.load(files / f"{name}.json") for name in EDITS}
    settings = {f"dial@{trust:g}": named["dial"].dialed(trust) for trust in (1.0, -1.0, 0.5)} | named
    edits = [Edit(name, files, settings[name]) for name in NAMES if name != "none"]
    return {"none": answers(model, prompts, TOKENS).texts} | {
        edit.name: expected(model, edit, prompts, TOKENS).texts for edit in edits
    }


def test_each_edit_alone_gives_the_tokens_of_hooks(served, prompts, truth):
    server, _ = served
    assert len({tuple(texts) for texts in truth.values()}) == len(NAMES)
    for name in NAMES:
        assert [server.answer(name, prompt, TOKENS) for prompt in prompts[:4]] == truth[name][:4]


def test_edits_mixed_32_at_once_give_the_tokens_of_hooks(served, prompts, truth):
    server, _ = served
    rows = [(name, number) for number in range(len(prompts)) for name in NAMES]
    with ThreadPoolExecutor(32) as threads:
        texts = list(threads.map(lambda row: server.answer(row[0], prompts[row[1]], TOKENS), rows))
    differing = [row for row, text in zip(rows, texts, strict=True) if text != truth[row[0]][row[1]]]
    assert differing == []


def test_verify_asks_the_running_server(served, model, adapters, prompts):
    server, _ = served
    findings = list(verified(model, edits_in(adapters), prompts[:4], max_new_tokens=6, server=server))
    assert len(findings) == 2 * 5
    assert all(finding.holds for finding in findings)


def load(server: Server, name: str, path: Any) -> str:
    """Ask the server to load an adapter; returns what is wrong with it."""
    body = json.dumps({"lora_name": name, "lora_path": str(path)}).encode()
    request = urllib.request.Request(f"{server._url}/v1/load_lora_adapter", body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=120):
            return ""
    except urllib.error.HTTPError as error:
        return error.read().decode()


def changed(adapters, tmp_path, name, values=None, **changes):
    folder = tmp_path / name
    shutil.copytree(adapters / "pruned", folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    if values is not None:
        tensors = load_file(folder / "adapter_model.safetensors")
        (folder / "adapter_model.safetensors").unlink()
        save_file({name: values(tensor) for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    return folder


def test_a_rank_above_the_flag_is_refused_by_vllm(served, adapters, tmp_path):
    server, _ = served
    wide = changed(adapters, tmp_path, "wide", lambda values: torch.nn.functional.pad(values, (0, 0, 0, 600)), r=1024)
    assert "rank" in load(server, "wide", wide)


def test_an_adapter_of_a_narrower_base_is_refused_by_verify_because_vllm_takes_it(
    served, model, adapters, tmp_path, prompts
):
    server, _ = served
    # Of A the columns, of B the rows.
    narrow = changed(adapters, tmp_path, "narrow", lambda values: values[:288, :288].contiguous())
    assert load(server, "narrow", narrow) == ""
    with pytest.raises(UserError, match="which this model does not have so; give its base"):
        list(verified(model, edits_in(narrow), prompts[:1], max_new_tokens=1))


def test_alpha_0_changes_nothing(served, adapters, tmp_path, prompts, truth):
    server, _ = served
    assert load(server, "idle", changed(adapters, tmp_path, "idle", lora_alpha=0)) == ""
    assert [server.answer("idle", prompt, TOKENS) for prompt in prompts[:3]] == truth["none"][:3]


def test_none_is_safe_where_every_slot_is_taken(served, prompts, truth):
    """On CPUs a request without an adapter gets the last slot's where no slot is free; ``none`` has one of its own."""
    server, _ = served
    # More settings than there are slots.
    names = [*NAMES, *(f"dial@{share / 10:g}" for share in range(-9, 10))]
    rows = [(name, number) for number in range(4) for name in (*names, *["none"] * 6)]
    with ThreadPoolExecutor(32) as threads:
        texts = list(threads.map(lambda row: server.answer(row[0], prompts[row[1]], TOKENS), rows))
    wrong = [row for row, text in zip(rows, texts, strict=True) if row[0] in truth and text != truth[row[0]][row[1]]]
    assert wrong == []


def test_it_stops_cleanly(served):
    server, process = served
    process.send_signal(signal.SIGINT)
    process.wait(120)
    with pytest.raises(UserError, match="does not answer"):
        Server(server._url)
