import json
import os
import resource
import subprocess
import sys
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from interp import activation_store, activations
from interp.activation_store import ActivationStore
from interp.activations import record, sites_of
from interp.anatomy import Anatomy
from interp.conflicts import ConflictSet
from interp.errors import UserError
from interp.evaluation import measure_usage
from tests.interp.test_activations import MORE_TEXTS, RESIDUAL, TEXTS, assert_close, token_ids
from tests.tiny import tiny_conflicts


@pytest.fixture
def small_shards(monkeypatch):
    """Five prompts a shard, so that a few prompts make several."""
    monkeypatch.setattr(activation_store, "SHARD_PROMPTS", 5)


def store_of(folder, model, prompts=MORE_TEXTS, sites=("embed.hook_out", RESIDUAL), positions: Any = "all", **options):
    chosen: dict[str, Any] = {"name": "tiny", **options}
    return ActivationStore.record(folder, model, prompts, sites, positions, **chosen)


def contents(folder):
    """The bytes of every file, also of hidden ones."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_store_holds_what_record_gives(tiny_llama, tmp_path, small_shards):
    sites = sites_of(tiny_llama, ["residual", "z"])
    expected = record(tiny_llama, MORE_TEXTS, sites, "all")
    store = store_of(tmp_path / "store", tiny_llama, sites=sites)
    assert store.complete
    assert list(store) == store.sites == sites
    assert len(list(store.shards(sites[0]))) == 6
    for site in sites:
        assert_close(store[site], expected[site])
    assert store.index["prompt"].to_list() == expected.prompt.tolist()
    assert store.index["position"].to_list() == expected.position.tolist()


def test_the_index_says_which_token_of_which_text_a_row_is(tiny_llama, tmp_path, small_shards):
    index = store_of(tmp_path / "store", tiny_llama).index
    expected = [
        (i, p, token, str(i), text)
        for i, text in enumerate(MORE_TEXTS)
        for p, token in enumerate(token_ids(tiny_llama, text))
    ]
    assert index.select("prompt", "position", "token", "id", "text").rows() == expected


def test_the_index_carries_what_the_examples_say(tiny_llama, tmp_path, small_shards):
    conflicts = tiny_conflicts()
    index = store_of(tmp_path / "store", tiny_llama, conflicts, positions="last").index
    columns = ["id", "subject", "relation", "template", "kind", "split", "source"]
    assert index.select(columns).rows() == [tuple(getattr(e, c) for c in columns) for e in conflicts]
    assert index["text"].to_list() == [e.prompt for e in conflicts]


def test_rows_are_read_in_the_order_asked_for(tiny_llama, tmp_path, small_shards):
    store = store_of(tmp_path / "store", tiny_llama)
    everything = store[RESIDUAL]
    wanted = [len(everything) - 1, 3, 40, 3, 0, 41]
    assert torch.equal(store.read(RESIDUAL, wanted), everything[wanted])
    assert store.read(RESIDUAL, []).shape == (0, everything.shape[1])
    some = store.rows(wanted)
    assert dict(some).keys() == dict(store).keys()
    assert torch.equal(some[RESIDUAL], everything[wanted])


def test_a_row_or_site_that_a_store_lacks_is_an_error(tiny_llama, tmp_path):
    store = store_of(tmp_path / "store", tiny_llama, ["Note", "Peru"], positions="last")
    assert "blocks.0.hook_out" not in store
    assert "blocks.0.hook_out" not in store.rows([0])
    with pytest.raises(UserError, match=r"recorded are embed.hook_out, blocks.1.hook_out"):
        store["blocks.0.hook_out"]
    for row in (2, -1):
        with pytest.raises(UserError, match=f"has no row {row}; its rows are 0 to 1"):
            store.read(RESIDUAL, [0, row])


def test_values_are_mapped_into_memory_not_read(tiny_llama, tmp_path):
    """What is written over the file afterwards is seen in the values: they are the file, not a copy of it."""
    store = store_of(tmp_path / "store", tiny_llama)
    values = next(store.shards(RESIDUAL))
    assert values.abs().min() > 0
    (file,) = (tmp_path / "store").glob("shards/*/activations.safetensors")
    with file.open("r+b") as stream:
        header = int.from_bytes(stream.read(8), "little")
        stream.seek(8 + header)
        stream.write(bytes(file.stat().st_size - 8 - header))
    assert values.abs().max() == 0


def test_a_finished_store_is_opened_without_a_forward_pass(tiny_llama, tmp_path, monkeypatch):
    store_of(tmp_path / "store", tiny_llama)
    before = contents(tmp_path / "store")
    monkeypatch.setattr(activations, "observe", lambda *_: pytest.fail("nothing is left to record"))
    assert store_of(tmp_path / "store", tiny_llama).complete
    assert contents(tmp_path / "store") == before


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"name": "other"}, "its model is .*tiny.*, not .*other"),
        ({"prompts": [*MORE_TEXTS[1:], "else"]}, "its data is"),
        ({"sites": [RESIDUAL]}, "its sites is .*embed.hook_out.*, not"),
        ({"positions": "last"}, 'its positions is "all", not "last"'),
        ({"seed": 1}, "its seed is 0, not 1"),
        ({"dtype": torch.float16}, 'its dtype is "float32", not "float16"'),
        ({"batch_size": 7}, "its batch_size is 32, not 7"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_store_of_something_else_is_refused_and_left_alone(tiny_llama, tmp_path, changed, named):
    store_of(tmp_path / "store", tiny_llama)
    before = contents(tmp_path / "store")
    with pytest.raises(UserError, match=f"{named}.*; give the name of a new folder"):
        store_of(tmp_path / "store", tiny_llama, **changed)
    assert contents(tmp_path / "store") == before


def test_a_store_of_other_weights_is_refused(tiny_llama, tiny_directories, tmp_path):
    plain: Any = AutoModelForCausalLM.from_pretrained(tiny_directories["llama"])
    plain.tokenizer = tiny_llama.tokenizer
    store_of(tmp_path / "store", plain)
    with torch.no_grad():
        plain.model.norm.weight[0] += 1
    with pytest.raises(UserError, match="its model is"):
        store_of(tmp_path / "store", plain)


def test_a_folder_that_is_not_a_store_is_refused(tiny_llama, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "precious").write_text("x")
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "folder", tmp_path / "file", tmp_path / "nothing"):
        with pytest.raises(UserError, match="is not an activation store; give a folder"):
            ActivationStore(path)
    for path in (tmp_path / "folder", tmp_path / "file"):
        with pytest.raises(UserError, match="is not an activation store; give the name of a new folder"):
            store_of(path, tiny_llama)
    with pytest.raises(UserError, match="choose another folder"):
        store_of(tmp_path / "file" / "below", tiny_llama)
    assert contents(tmp_path / "folder") == {"precious": b"x"}


def test_a_store_of_another_version_is_refused(tiny_llama, tmp_path):
    store_of(tmp_path / "store", tiny_llama)
    basis = json.loads((tmp_path / "store" / "store.json").read_text())
    (tmp_path / "store" / "store.json").write_text(json.dumps(basis | {"version": 0}))
    with pytest.raises(UserError, match="record it again"):
        ActivationStore(tmp_path / "store")


def test_answers_of_texts_are_refused(tiny_llama, tmp_path):
    with pytest.raises(UserError, match="give conflict examples, not texts alone"):
        store_of(tmp_path / "store", tiny_llama, answers=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("rows_that_fit", [1, 40])
def test_a_shard_holds_no_more_bytes_than_it_may(tiny_llama, tmp_path, monkeypatch, rows_that_fit):
    bytes_per_row = 2 * 32 * 4
    monkeypatch.setattr(activation_store, "SHARD_BYTES", rows_that_fit * bytes_per_row)
    store = store_of(tmp_path / "store", tiny_llama)
    sizes = [len(values) for values in store.shards(RESIDUAL)]
    lengths = [len(token_ids(tiny_llama, text)) for text in MORE_TEXTS]
    assert all(size <= rows_that_fit for size in sizes) or sizes == lengths
    assert set(accumulate(sizes)) <= set(accumulate(lengths))
    assert_close(store[RESIDUAL], record(tiny_llama, MORE_TEXTS, [RESIDUAL], "all")[RESIDUAL])


def interrupted(monkeypatch, after):
    """Make the forward pass with this number fail."""
    original, calls = activations.observe, []

    def observe(*args):
        calls.append(None)
        if len(calls) > after:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(activations, "observe", observe)


def test_an_interrupted_recording_goes_on_to_identical_bytes(tiny_llama, tmp_path, small_shards, monkeypatch):
    store_of(tmp_path / "whole", tiny_llama, batch_size=2)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupted(patch, after=10)
        store_of(tmp_path / "store", tiny_llama, batch_size=2)
    half = ActivationStore(tmp_path / "store")
    assert not half.complete
    # Three forward passes a shard: the fourth shard was under way.
    assert half.index["prompt"].unique().to_list() == list(range(15))
    assert len(half[RESIDUAL]) == len(half.index)
    with monkeypatch.context() as patch:
        interrupted(patch, after=8)
        assert store_of(tmp_path / "store", tiny_llama, batch_size=2).complete
    assert contents(tmp_path / "store") == contents(tmp_path / "whole")


def test_nothing_recorded_yet_is_an_empty_store(tiny_llama, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupted(patch, after=0)
        store_of(tmp_path / "store", tiny_llama)
    empty = ActivationStore(tmp_path / "store")
    assert not empty.complete
    assert empty.index.is_empty()
    with pytest.raises(UserError, match="has no rows yet"):
        empty[RESIDUAL]


def test_what_a_killed_run_left_half_written_is_cleared(tiny_llama, tmp_path, small_shards):
    store_of(tmp_path / "store", tiny_llama)
    before = contents(tmp_path / "store")
    (tmp_path / "store" / ".store.json.x1y2").write_text('{"form')
    (tmp_path / "store" / "shards" / ".00006.abcd").mkdir()
    (tmp_path / "store" / "shards" / ".00006.abcd" / "activations.safetensors").write_bytes(b"half")
    store_of(tmp_path / "store", tiny_llama)
    assert contents(tmp_path / "store") == before


def test_a_run_killed_before_the_first_file_was_whole_is_taken_up(tiny_llama, tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / ".store.json.x1y2").write_text('{"form')
    assert store_of(tmp_path / "store", tiny_llama).complete
    assert ".store.json.x1y2" not in contents(tmp_path / "store")


def test_a_second_writer_is_refused(tiny_llama, tmp_path, monkeypatch):
    original, refused = activations.observe, []

    def observe(*args):
        with pytest.raises(UserError, match=r"Another process is recording to .*; wait for it") as error:
            store_of(tmp_path / "store", tiny_llama)
        refused.append(error)
        return original(*args)

    monkeypatch.setattr(activations, "observe", observe)
    assert store_of(tmp_path / "store", tiny_llama).complete
    assert refused


def test_a_disk_that_fills_up_is_one_sentence_and_the_recording_goes_on_later(tiny_llama, tmp_path, small_shards):
    """A real refusal of the operating system: no file may grow beyond what a shard of short prompts needs."""
    texts = [*["Peru"] * 5, *TEXTS, *["Peru"] * 5]
    sites = list(Anatomy(tiny_llama).observed())
    whole = contents(store_of(tmp_path / "whole", tiny_llama, texts, sites).path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
    try:
        with pytest.raises(UserError, match=r"Could not write .*00001.*File too large.*record again"):
            store_of(tmp_path / "store", tiny_llama, texts, sites)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(p.name for p in (tmp_path / "store" / "shards").iterdir()) == ["00000"]
    store_of(tmp_path / "store", tiny_llama, texts, sites)
    assert contents(tmp_path / "store") == whole


def test_answers_put_the_measured_usage_into_conflict_rows_only(smollm2, capital_conflicts, tmp_path, small_shards):
    conflicts = ConflictSet("some", capital_conflicts.select(templates=["question"]).examples[:10])
    store = store_of(tmp_path / "store", smollm2, conflicts, ["embed.hook_out"], "last", answers=True)
    expected = measure_usage(smollm2, conflicts.select(kind="conflict")).frame.select("id", "answer", "usage")
    assert 0 < len(expected) < len(conflicts)
    assert store.index.filter(kind="conflict").select("id", "answer", "usage").rows() == expected.rows()
    others = store.index.filter(store.index["kind"] != "conflict")
    assert len(others) == len(conflicts) - len(expected)
    assert others["usage"].null_count() == others["answer"].null_count() == len(others)


KILLS = 8

# Loads the model once and forks a child for each run. Before a fork nothing runs that keeps threads: no polars, no
# recording, no bridge. Each child is killed after a random time, or once the store has the child's share of the shards:
# else a machine that becomes faster meanwhile would finish before the last kill.
KILLER = f"""
import json, os, random, signal, sys, time, traceback
from pathlib import Path

import torch

from interp import activation_store
from interp.activations import sites_of
from interp.models import load_checkpoint

torch.set_num_threads(1)
activation_store.SHARD_PROMPTS = 64
model, model.tokenizer = load_checkpoint(sys.argv[1])
root = Path(sys.argv[2])
texts = [f"The capital of {{land}}, we hear, is number {{i}} of" for i in range(600) for land in
         ("Italy", "France", "Japan", "Egypt", "Peru")]


def start(folder):
    child = os.fork()
    if not child:
        try:
            sites = sites_of(model)
            activation_store.ActivationStore.record(folder, model, texts, sites, name="tiny")
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return child


def shards(folder):
    return len(list((folder / "shards").glob("[0-9]*")))


begin = time.perf_counter()
assert os.waitpid(start(root / "whole"), 0)[1] == 0
seconds = time.perf_counter() - begin
rng = random.Random(0)
total = shards(root / "whole")
signals, recorded = [], []
for number in range({KILLS}):
    child = start(root / "store")
    moment = time.perf_counter() + rng.random() * seconds / 4
    share = total * (number + 1) // ({KILLS} + 3)
    while time.perf_counter() < moment and shards(root / "store") < share:
        time.sleep(0.002)
    time.sleep(rng.random() * seconds / total)
    os.kill(child, signal.SIGKILL)
    signals.append(os.WTERMSIG(os.waitpid(child, 0)[1]))
    recorded.append(shards(root / "store"))
finished = os.waitpid(start(root / "store"), 0)[1]
print(json.dumps({{"signals": signals, "recorded": recorded, "finished": finished, "shards": total}}))
"""


def test_a_recording_killed_at_random_moments_ends_with_the_bytes_of_an_undisturbed_one(tiny_directories, tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", KILLER, str(tiny_directories["llama"]), str(tmp_path)],
        env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["signals"] == [9] * KILLS
    assert report["recorded"] == sorted(report["recorded"])
    assert 0 < report["recorded"][-1] < report["shards"]
    assert report["finished"] == 0
    whole = contents(tmp_path / "whole")
    assert len(whole) == 1 + 2 * report["shards"]
    assert contents(tmp_path / "store") == whole


def test_shards_that_are_recorded_apart_and_in_any_order_are_those_of_one_process(tiny_llama, tmp_path, small_shards):
    store_of(tmp_path / "whole", tiny_llama, batch_size=2)
    whole = contents(tmp_path / "whole")
    sites = ("embed.hook_out", RESIDUAL)
    shards = ActivationStore.shard_prompts(tiny_llama, MORE_TEXTS, sites, "all")
    assert len(shards) == len(list((tmp_path / "whole" / "shards").iterdir()))
    store_of(tmp_path / "apart", tiny_llama, batch_size=2, only={})
    for number in reversed(range(1, len(shards))):
        some = {number: shards[number]}
        assert not store_of(tmp_path / "apart", tiny_llama, batch_size=2, only=some).complete
    (tmp_path / "apart" / "shards" / ".00000.half").mkdir()
    store_of(tmp_path / "apart", tiny_llama, batch_size=2, only={0: shards[0]})
    assert store_of(tmp_path / "apart", tiny_llama, batch_size=2, only={}).complete
    assert contents(tmp_path / "apart") == whole
    with pytest.raises(UserError, match="another recording"):
        store_of(tmp_path / "apart", tiny_llama, MORE_TEXTS[1:], batch_size=2, only={0: shards[0]})
