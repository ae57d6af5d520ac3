"""Mutated intervention files: each is refused in one sentence, or is valid and says exactly what it does.

Whatever the file, loading it takes no time to speak of and does nothing but open files of its own folder to read them:
Python's audit events tell.
"""

import copy
import hashlib
import json
import math
import os
import pickle
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from interp.errors import UserError
from interventions.base import Intervention
from interventions.config import InterventionFile
from interventions.dial import DialPoint, DialScale, TrustDial
from interventions.feedforward import FeedForwardScaling
from interventions.gate import ConflictGate
from interventions.heads import HeadScaling, ScaledHead
from interventions.identity import ModelIdentity
from interventions.steering import Steering
from tests.interventions.test_config import feature_edit, sparsify_edit

N_LAYERS, N_HEADS, WIDTH = 3, 4, 32
# More cases than `make test` takes: FUZZ=10 python -m pytest tests/interventions/test_config_fuzz.py
MORE = int(os.environ.get("FUZZ", "1"))
SLOWEST = 5.0
TENSORS = "edit.tensors.safetensors"

# What happens while a file is loaded: an audit hook cannot be taken off again, so it has a switch.

_events: list[tuple[str, tuple[Any, ...]]] | None = None
_watched_thread = 0


def _listen(event: str, args: tuple[Any, ...]) -> None:
    if _events is not None and threading.get_ident() == _watched_thread:
        _events.append((event, args))


sys.addaudithook(_listen)


@contextmanager
def watched() -> Iterator[list[tuple[str, tuple[Any, ...]]]]:
    """Every audit event of this thread: files, imports, compiled code, processes, sockets, pickles."""
    global _events, _watched_thread
    events: list[tuple[str, tuple[Any, ...]]] = []
    _events, _watched_thread = events, threading.get_ident()
    try:
        yield events
    finally:
        _events = None


def only_reads(event: str, args: tuple[Any, ...], folder: Path) -> bool:
    """Whether an event is that a file of ``folder``, and not one that a link there leads to, is opened to be read."""
    if event != "open":
        return False
    path, mode, flags = args
    if isinstance(path, int):
        # What was opened before, and heard of then.
        return True
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    return mode in ("r", None) and not flags & writing and Path(os.path.realpath(path)).parent == folder.resolve()


# Valid files


def every_kind(folder: Path) -> dict[str, list[Intervention]]:
    """Interventions for a tiny Llama that have every kind of entry between them, for several files."""
    generator = torch.Generator().manual_seed(0)
    heads = HeadScaling((ScaledHead(1, 1, 0.0), ScaledHead(2, 3, -1.5, tuple(0.1 * i for i in range(8)))))
    layers = FeedForwardScaling(((1, 0.5), (2, -2.0)))
    dial = TrustDial(
        (DialScale(1, 1, 0.5, 2.0), DialScale(2, None, 1.0, 0.25)),
        0.5,
        (DialPoint(-1.0, 0.75, 0.0), DialPoint(0.0, 0.5, 0.5), DialPoint(1.0, 0.0, 0.75)),
    )
    steering = Steering(1, torch.randn(WIDTH, generator=generator), 0.7, "answer")
    edits = (heads, layers, dial, steering, sparsify_edit(folder))
    return {
        "scales": [heads, layers, dial],
        "features": [steering, feature_edit(folder / "topk", "topk"), feature_edit(folder / "mp", "matching_pursuit")],
        "separate": [feature_edit(folder / "jumprelu", "jumprelu"), feature_edit(folder / "gated", "gated")],
        "gate": [ConflictGate("block", 0, torch.randn(WIDTH, generator=generator), 0.25, -1.0, edits), steering],
    }


def save_every_kind(folder: Path, network: nn.Module) -> list[Path]:
    """The paths of valid files, each alone in a folder, that have every kind of entry between them."""
    paths = []
    for name, interventions in every_kind(folder / "saes").items():
        paths.append(folder / name / "edit.json")
        InterventionFile.of(
            interventions,
            name=name,
            towards="context",
            model=ModelIdentity.of(network, "tiny"),
            provenance={"method": "none", "seed": 0, "versions": {"torch": "2"}, "prompts": [1, 2.5, None, "x"]},
            measured={"test": {"context_rate": [0.5, 0.25, 1], "n": 3}},
        ).save(paths[-1])
    return paths


@dataclass
class Fuzzed:
    """Valid files, the model that they are for, and what has been seen so far.

    Attributes:
        network: The model, of transformers.
        folders: For each name the folder of its ``edit.json``; what must not be read lies there and around it.
        documents, tensors: Their contents, and those of their tensors.
        seen: How many mutated files were refused, accepted, and attached.
    """

    network: Any
    folders: dict[str, Path]
    documents: dict[str, bytes]
    tensors: dict[str, bytes]
    seen: Counter[str] = field(default_factory=Counter)

    def record(self, name: str) -> dict[str, Any]:
        return json.loads(self.documents[name])

    def judge(self, path: Path, tensors: bytes | None = None) -> None:
        """Load a file that may be anything, and see that it was refused well or is valid."""
        loaded, message = load(path)
        if loaded is None:
            self.seen["refused"] += 1
            assert_one_sentence(message)
            return
        self.seen["accepted"] += 1
        assert_says(json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=said_once), loaded)
        if tensors is not None:
            assert_same_tensors(loaded._values, tensors_in(tensors))
        assert_within_the_model(loaded)
        assert_saved_and_loaded_again(loaded, path.parent / "again" / "edit.json")
        self.seen["attached"] += attaches(loaded, self.network)


@pytest.fixture(scope="module")
def fuzzed(tiny_directories, tmp_path_factory) -> Iterator[Fuzzed]:
    root = tmp_path_factory.mktemp("fuzz")
    network = AutoModelForCausalLM.from_pretrained(tiny_directories["llama"]).eval()
    folders = {path.parent.name: path.parent for path in save_every_kind(root, network)}
    folders["old"] = root / "old"
    folders["old"].mkdir()
    (folders["old"] / "edit.json").write_text(json.dumps(of_version_1(folders["scales"] / "edit.json")))
    folders["dial"] = root / "dial"
    folders["dial"].mkdir()
    (folders["dial"] / "edit.json").write_text(json.dumps(of_version_2(folders["scales"] / "edit.json")))
    for name, folder in folders.items():
        if (folder / TENSORS).exists():
            content = (folder / TENSORS).read_bytes()
            (root / f"{name}.safetensors").write_bytes(content)
            (folder / "sub").mkdir()
            (folder / "sub" / TENSORS).write_bytes(content)
            (folder / "out.safetensors").symlink_to(root / f"{name}.safetensors")
            (folder / "in.safetensors").symlink_to(TENSORS)
            (folder / "loop.safetensors").symlink_to("loop.safetensors")
            (folder / "folder.safetensors").mkdir()
            os.mkfifo(folder / "pipe.safetensors")
    threads = torch.get_num_threads()
    # The model is so small that threads only wait for each other.
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        # Nothing here has to survive a power cut.
        patch.setattr("interp.files._sync", lambda _: None)
        yield Fuzzed(
            network,
            folders,
            {name: (folder / "edit.json").read_bytes() for name, folder in folders.items()},
            {name: (folder / TENSORS).read_bytes() for name, folder in folders.items() if (folder / TENSORS).exists()},
        )
    torch.set_num_threads(threads)


def of_version_1(path: Path) -> dict[str, Any]:
    """What version 1 would have written."""
    record = of_version_2(path)
    record["version"] = 1
    record["provenance"] = {"method": "none", "seed": 0, "prompts": [1, 2.5]}
    del record["sites"]
    for later in ("n_kv_heads", "d_mlp", "d_vocab", "weights", "tokenizer"):
        del record["model"][later]
    return record


def of_version_2(path: Path) -> dict[str, Any]:
    """What version 2 would have written."""
    record = json.loads(path.read_text())
    record["version"] = 2
    for dial in (entry for entry in record["interventions"] if entry["kind"] == "trust_dial"):
        dial["gates"] = dial.pop("scales")
    return record


# What holds of every file


def load(path: Path) -> tuple[InterventionFile | None, str]:
    """The file, or the message with which it was refused; that it was quick and opened nothing else is asserted."""
    loaded, message = None, ""
    started = time.monotonic()
    with watched() as events:
        try:
            loaded = InterventionFile.load(path)
        except UserError as error:
            message = str(error)
    assert time.monotonic() - started < SLOWEST
    assert [event for event in events if not only_reads(*event, path.parent)] == []
    return loaded, message


def assert_one_sentence(message: str) -> None:
    assert 20 < len(message) < 2000
    assert not re.search(r"[\x00-\x1f\x7f-\x9f]", message)
    assert message.endswith((".", "pip install --upgrade conflictscope"))


def said_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


OPTIONAL: dict[str, Any] = {
    "towards": None,
    "tensors": None,
    "mean": None,
    "calibration": [],
    "measured": {},
    "details": {},
    "versions": {},
    "provenance": {"method": None, "data": None, "chosen_on": None, "seed": None, "versions": {}, "details": {}},
    **dict.fromkeys(["method", "data", "chosen_on", "seed"]),
    **dict.fromkeys(["n_kv_heads", "d_mlp", "d_vocab", "weights", "tokenizer"]),
}


def assert_says(record: Any, loaded: InterventionFile) -> None:
    """The file says what its record says, no more, no less, no other: but for whole numbers where others may be."""
    dumped = loaded.model_dump()
    if record["version"] < 3:
        for entry in record["interventions"]:
            for dial in entry.get("interventions", [entry]):
                if dial["kind"] == "trust_dial":
                    dial["scales"] = dial.pop("gates")
    if record["version"] == 1:
        provenance = record.pop("provenance", {})
        kept = dumped.pop("provenance")
        details = kept.pop("details")
        # Version 1 had no fields: what does not fit one of today's is a detail.
        fields = {"method": str, "data": str, "chosen_on": str, "seed": int, "versions": dict}
        fitting = {key for key, kind in fields.items() if isinstance(provenance.get(key), kind)}
        assert same({key: provenance[key] for key in fitting}, kept)
        assert same({key: value for key, value in provenance.items() if key not in fitting}, details)
        del dumped["sites"]
    record["version"] = 3
    assert same(record, dumped)


def same(said: Any, loaded: Any) -> bool:
    if isinstance(said, dict):
        return (
            isinstance(loaded, dict)
            and all(key in loaded and same(value, loaded[key]) for key, value in said.items())
            and all(loaded[key] == OPTIONAL[key] for key in loaded.keys() - said.keys())
        )
    if isinstance(said, list):
        return isinstance(loaded, list) and len(said) == len(loaded) and all(map(same, said, loaded))
    if type(said) is int:
        return type(loaded) in (int, float) and loaded == said
    return type(loaded) is type(said) and loaded == said


def assert_within_the_model(loaded: InterventionFile) -> None:
    for key, value in leaves(loaded.model_dump()):
        assert not isinstance(value, float) or math.isfinite(value), key
    for key, value in leaves([entry.model_dump() for entry in loaded.interventions]):
        assert key != "layer" or 0 <= value < loaded.model.n_layers
        assert key != "head" or value is None or 0 <= value < loaded.model.n_heads
    for values in loaded._values.values():
        assert values.isfinite().all()


def leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Everything that holds nothing else, with the name of the field that it is in."""
    if isinstance(value, dict):
        for name, part in value.items():
            yield from leaves(part, name)
    elif isinstance(value, list):
        for part in value:
            yield from leaves(part, key)
    else:
        yield key, value


def assert_saved_and_loaded_again(loaded: InterventionFile, path: Path) -> None:
    loaded.save(path)
    again = InterventionFile.load(path)
    # Where the tensors lie is not the same.
    assert again.model_dump(exclude={"tensors"}) == loaded.model_dump(exclude={"tensors"})
    assert_same_tensors(again._values, loaded._values)


def assert_same_tensors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name].dtype == values.dtype
        assert torch.equal(found[name], values)


def attaches(loaded: InterventionFile, network: Any) -> bool:
    """Whether a file attaches to a model; if it does, a pass runs with it. The model is afterwards as it was."""
    try:
        handle = loaded.attach(network)
    except UserError as error:
        attached = False
        assert_one_sentence(str(error))
    else:
        attached = True
        with handle, torch.inference_mode():
            network(input_ids=torch.arange(6).reshape(2, 3))
    assert "generate" not in vars(network)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
    return attached


DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def tensors_in(content: bytes) -> dict[str, Tensor]:
    """What a safetensors file holds, by its definition."""
    start = 8 + int.from_bytes(content[:8], "little")
    tensors = {}
    for name, about in json.loads(content[8:start]).items():
        if name != "__metadata__":
            begin, end = (start + offset for offset in about["data_offsets"])
            flat = torch.frombuffer(bytearray(content[begin:end]), dtype=DTYPES[about["dtype"]])
            tensors[name] = flat.reshape(about["shape"])
    return tensors


# Mutations of a record


@dataclass(frozen=True)
class Raw:
    """JSON, or something like it, that is written as it is."""

    text: str


def written(value: Any) -> str:
    """``json.dumps``, for records that hold ``Raw``."""
    if isinstance(value, Raw):
        return value.text
    if isinstance(value, dict):
        return "{" + ",".join(f"{json.dumps(key)}:{written(part)}" for key, part in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(written, value)) + "]"
    return json.dumps(value)


NAMES = [
    *(TENSORS, "in.safetensors", "out.safetensors", "loop.safetensors", "pipe.safetensors", "folder.safetensors"),
    *("../edit.safetensors", "../features.safetensors", "../gate.safetensors", f"sub/{TENSORS}", f"..\\{TENSORS}"),
    *("..", ".", "", "/", "/etc/passwd", "/dev/zero", "edit.json", "\x00.safetensors", "none.safetensors\x00"),
    *("C:out.safetensors", "%2e%2e/out.safetensors", "東" * 200 + ".safetensors", "x" * 255 + ".safetensors"),
]
WORDS = [
    *("context", "memory", "block", "mlp", "output_projection", "attention_post_norm", "all", "answer", "replace"),
    *("targets", "change", "topk", "abstopk", "standard", "jumprelu", "gated", "matching_pursuit", "layer_norm"),
    *("head_scaling", "feed_forward_scaling", "trust_dial", "steering", "feature_edit", "conflict_gate", "input"),
    *("MistralForCausalLM", "GPT2LMHeadModel", "F32", "F16", "BF16", "F64", "I64", "F8_E4M3", "F8_E5M2", "BOOL", "F4"),
    *("0", "1.0", "NaN", "true", "\ud800", "\udfff\ud800", "\x00", "a\nb\r\x1b[2J", "🙂", "é" * 5000, "AAAA", "A" * 76),
]
NUMBERS = [
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2,
        3,
        4,
        5,
        7,
        8,
        32,
        40,
        0.5,
        -0.5,
        1.5,
        1.0,
        2.0,
        -0.0,
        1e4,
        10001,
        -1e4,
        1e9,
        1e10,
    ),
    *(2**12, 2**20, 2**26, 2**31, 2**53 + 1, 2**63, -(2**63), 2**64, 1e38, 1e308, 5e-324, 1e-300),
    *map(Raw, ("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1e-999", "1" + "0" * 400, "9" * 5000, "-0", "1E+2")),
    *map(Raw, ("01", ".5", "1.", "+1", "0x10", "1_000", "'a'", "undefined", '"\\ud83d"', '"\\x41"', '"\t"', "")),
]
CONTAINERS = [
    *([], {}, [None], [[]], [0, 1], [1, 0], {"a": 1}, {"layer": 0}, [0.0] * 8, ["x"] * 3, {"kind": "steering"}),
    *(Raw("[" * n + "]" * n) for n in (50, 240, 255, 256, 300, 900, 100_000)),
    *(Raw('{"a":' * n + "1" + "}" * n) for n in (50, 254, 256, 100_000)),
]
VALUES = st.one_of(*map(st.sampled_from, (NAMES, WORDS, NUMBERS, CONTAINERS)))
KEYS = [
    *OPTIONAL,
    "layer",
    "head",
    "kind",
    "heads",
    "interventions",
    "file",
    "W_enc",
    "threshold",
    "__class__",
    "",
    "\x00",
]


def places_in(tree: Any) -> list[tuple[Any, Any]]:
    """Every ``(container, key or index)`` of a record."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [place for key, part in list(items) for place in [(tree, key), *places_in(part)]]


def put(container: Any, key: Any, value: Any, _: Any) -> None:
    container[key] = value


def remove(container: Any, key: Any, *_: Any) -> None:
    del container[key]


def rename(container: Any, key: Any, value: Any, _: Any) -> None:
    name = value if isinstance(value, str) else KEYS[len(written(value)) % len(KEYS)]
    if isinstance(container, dict):
        container[name] = container.pop(key)
    else:
        container.insert(0, container.pop(key))


def add(container: Any, key: Any, value: Any, other: Any) -> None:
    if isinstance(container, dict):
        container[KEYS[len(written(value)) % len(KEYS)]] = value
    else:
        container.insert(key, other)


def repeat(container: Any, key: Any, *_: Any) -> None:
    if isinstance(container, list):
        container.append(copy.deepcopy(container[key]))
    elif isinstance(container[key], dict) and container[key]:
        name, part = next(iter(container[key].items()))
        container[key] = Raw(f"{{{json.dumps(name)}:{written(part)},{written(container[key])[1:]}")


def exchange(container: Any, key: Any, _: Any, other: Any) -> None:
    container[key] = other


def nudge(container: Any, key: Any, value: Any, _: Any) -> None:
    now = container[key]
    step = -1 if len(written(value)) % 2 else 1
    if isinstance(now, bool):
        container[key] = not now
    elif isinstance(now, int | float):
        container[key] = now + step
    elif isinstance(now, str):
        container[key] = now[:-1] if step < 0 else now + now[:1]
    elif isinstance(now, list):
        now.reverse()


def retype(container: Any, key: Any, *_: Any) -> None:
    now = container[key]
    if isinstance(now, bool):
        container[key] = int(now)
    elif isinstance(now, int):
        container[key] = float(now)
    elif isinstance(now, float):
        container[key] = str(now)
    elif now is None:
        container[key] = 0
    else:
        container[key] = [now]


CHANGES: list[Callable[[Any, Any, Any, Any], None]] = [
    put,
    put,
    remove,
    rename,
    add,
    repeat,
    exchange,
    nudge,
    nudge,
    retype,
]
MUTATION = st.tuples(st.integers(0, 2**16), st.integers(0, 2**16), st.sampled_from(CHANGES), VALUES)


def mutated(record: Any, mutations: list[tuple[int, int, Any, Any]]) -> Any:
    for first, second, change, value in mutations:
        places = places_in(record)
        if places:
            # By name first, so that numbers in long lists are not nearly all that is changed.
            names = sorted({str(key) for _, key in places})
            alike = [place for place in places if str(place[1]) == names[first % len(names)]]
            container, key = alike[second % len(alike)]
            from_container, from_key = places[second % len(places)]
            change(container, key, copy.deepcopy(value), copy.deepcopy(from_container[from_key]))
    return record


# Mutations of bytes


def edited(content: bytes, edits: list[tuple[str, int, int, bytes]], within: int) -> bytes:
    """Bytes changed at places below ``within``."""
    for kind, place, length, inserted in edits:
        start = place % (within + 1)
        end = start + length
        if kind == "flip" and start < len(content):
            content = content[:start] + bytes([content[start] ^ 1 << length % 8]) + content[start + 1 :]
        elif kind == "replace":
            content = content[:start] + inserted + content[start + len(inserted) :]
        elif kind == "insert":
            content = content[:start] + inserted + content[start:]
        elif kind == "remove":
            content = content[:start] + content[end:]
        elif kind == "repeat":
            content = content[:end] + content[start:]
        elif kind == "cut" and length % 4 == 0:
            content = content[:start]
    return content


PIECES = [
    *(
        b"0",
        b"1",
        b"9",
        b"-",
        b".",
        b"e",
        b"E9",
        b'"',
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
        b":",
        b"\\",
        b"\\u0000",
        b"\\ud800",
    ),
    *(b"null", b"true", b"\x00", b"\x7f", b"\x80", b"\xff", b"\xef\xbb\xbf", b"\xc0\x80", b"\xed\xa0\x80", b"\n", b" "),
    *(b"\xff" * 8, b"\x00" * 8, b"1" * 400, b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f"),
]
EDITS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "replace", "replace", "insert", "remove", "repeat", "cut"]),
        st.integers(0, 2**16),
        st.integers(0, 20),
        st.sampled_from(PIECES),
    ),
    min_size=1,
    max_size=2,
)


def fuzz(strategy: st.SearchStrategy[Any], check: Callable[[Any], None], cases: int) -> None:
    """Check many cases, the same in every run."""

    @settings(
        max_examples=cases * MORE,
        deadline=None,
        derandomize=True,
        database=None,
        # Not Phase.explain, whose tracing makes audit events of its own.
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(strategy)
    def run(case: Any) -> None:
        check(case)

    run()


def test_the_files_that_are_mutated_are_valid_and_have_every_kind_of_entry(fuzzed):
    kinds = set()
    for folder in fuzzed.folders.values():
        loaded, message = load(folder / "edit.json")
        assert loaded is not None, message
        assert attaches(loaded, fuzzed.network)
        kinds |= {value for key, value in leaves(loaded.model_dump()) if key == "kind"}
    assert kinds == {
        *("head_scaling", "feed_forward_scaling", "trust_dial", "steering", "feature_edit", "conflict_gate"),
    }


def test_mutated_records_are_refused_or_valid(fuzzed):
    def check(case: tuple[str, list[Any]]) -> None:
        name, mutations = case
        path = fuzzed.folders[name] / "mutated.json"
        path.write_text(written(mutated(fuzzed.record(name), mutations)))
        fuzzed.judge(path)

    fuzzed.seen.clear()
    fuzz(st.tuples(st.sampled_from(sorted(fuzzed.folders)), st.lists(MUTATION, min_size=1, max_size=3)), check, 700)
    assert fuzzed.seen["refused"] > 175
    assert fuzzed.seen["attached"] > 35


def test_tensors_anywhere_but_in_the_folder_are_refused(fuzzed):
    for name in fuzzed.tensors:
        for place in [
            *NAMES,
            str(fuzzed.folders[name] / TENSORS),
            str(fuzzed.folders[name].parent / "out.safetensors"),
        ]:
            record = fuzzed.record(name)
            record["tensors"]["file"] = place
            path = fuzzed.folders[name] / "mutated.json"
            path.write_text(json.dumps(record))
            fuzzed.judge(path)
            assert (load(path)[0] is not None) == (place in (TENSORS, "in.safetensors"))


def test_records_of_mutated_bytes_are_refused_or_valid(fuzzed):
    def check(case: tuple[str, list[Any]]) -> None:
        name, edits = case
        content = fuzzed.documents[name]
        path = fuzzed.folders[name] / "mutated.json"
        path.write_bytes(edited(content, edits, len(content)))
        fuzzed.judge(path)

    fuzzed.seen.clear()
    fuzz(st.tuples(st.sampled_from(sorted(fuzzed.folders)), EDITS), check, 500)
    assert fuzzed.seen["refused"] > 165
    assert fuzzed.seen["attached"] > 15


def with_mutated_header(content: bytes, mutations: list[Any]) -> bytes:
    size = int.from_bytes(content[:8], "little")
    header = written(mutated(json.loads(content[8 : 8 + size]), mutations)).encode("utf-8", "surrogatepass")
    return len(header).to_bytes(8, "little") + header + content[8 + size :]


def with_mutated_tensor(content: bytes, mutation: tuple[int, int, str]) -> bytes:
    tensors = tensors_in(content)
    which, place, change = mutation
    name = sorted(tensors)[which % len(tensors)]
    values = tensors[name]
    if change.startswith("torch."):
        tensors[name] = values.to(getattr(torch, change.removeprefix("torch.")))
    elif change == "all in half":
        tensors = {name: values.half() for name, values in tensors.items()}
    elif change == "drop":
        del tensors[name]
    elif change == "add":
        tensors[f"{name}\n{'x' * place}"] = values.clone()
    elif change == "exchange":
        tensors[name] = tensors[sorted(tensors)[place % len(tensors)]].clone()
    elif change == "transpose":
        tensors[name] = values.T.contiguous() if values.ndim == 2 else values[:, None].contiguous()
    elif change == "shorten":
        tensors[name] = values[:-1].contiguous()
    elif change == "empty":
        tensors[name] = values[:0].contiguous()
    else:
        values.view(-1)[place % values.numel()] = float(change)
    return save(tensors)


TENSOR_CHANGES = [
    *(
        "nan",
        "inf",
        "-inf",
        "0",
        "1",
        "1e38",
        "drop",
        "add",
        "exchange",
        "transpose",
        "shorten",
        "empty",
        "all in half",
    ),
    *("torch.float16", "torch.bfloat16", "torch.float64", "torch.int64", "torch.int8", "torch.bool"),
    *("torch.complex64", "torch.float8_e4m3fn", "torch.float8_e5m2"),
]
TENSOR_MUTATION = st.tuples(st.integers(0, 50), st.integers(0, 2**12), st.sampled_from(TENSOR_CHANGES))


def test_mutated_tensors_of_which_the_hash_is_right_are_refused_or_valid(fuzzed):
    def check(case: tuple[str, tuple[Any, Any]]) -> None:
        name, (change, argument) = case
        content = change(fuzzed.tensors[name], argument)
        folder = fuzzed.folders[name]
        (folder / "mutated.safetensors").write_bytes(content)
        record = fuzzed.record(name)
        record["tensors"] = {"file": "mutated.safetensors", "sha256": hashlib.sha256(content).hexdigest()}
        (folder / "mutated.json").write_text(json.dumps(record))
        fuzzed.judge(folder / "mutated.json", content)

    def with_edited_header(content: bytes, edits: list[Any]) -> bytes:
        return edited(content, edits, 8 + int.from_bytes(content[:8], "little"))

    def with_edited_bytes(content: bytes, edits: list[Any]) -> bytes:
        return edited(content, edits, len(content))

    changes = st.one_of(
        st.tuples(st.just(with_mutated_header), st.lists(MUTATION, min_size=1, max_size=2)),
        st.tuples(st.just(with_mutated_tensor), TENSOR_MUTATION),
        st.tuples(st.just(with_edited_header), EDITS),
        st.tuples(st.just(with_edited_bytes), EDITS),
    )
    fuzzed.seen.clear()
    fuzz(st.tuples(st.sampled_from(sorted(fuzzed.tensors)), changes), check, 500)
    assert fuzzed.seen["refused"] > 165
    assert fuzzed.seen["attached"] > 15


def test_mutated_tensors_of_which_the_hash_is_wrong_are_refused(fuzzed):
    def check(case: tuple[str, list[Any]]) -> None:
        name, edits = case
        content = fuzzed.tensors[name]
        changed = edited(content, edits, len(content))
        folder = fuzzed.folders[name]
        (folder / "mutated.safetensors").write_bytes(changed)
        record = fuzzed.record(name)
        record["tensors"]["file"] = "mutated.safetensors"
        (folder / "mutated.json").write_text(json.dumps(record))
        loaded, message = load(folder / "mutated.json")
        if changed == content:
            assert loaded is not None
        else:
            assert "is not the file that the intervention was saved with" in message

    fuzz(st.tuples(st.sampled_from(sorted(fuzzed.tensors)), EDITS), check, 500)


# Files that are none


@pytest.fixture
def steered(fuzzed, tmp_path) -> Path:
    """The path of a file with tensors."""
    path = tmp_path / "folder" / "edit.json"
    steering = Steering(1, torch.ones(WIDTH))
    InterventionFile.of([steering], name="test", model=ModelIdentity.of(fuzzed.network, "tiny")).save(path)
    return path


def with_tensors(path: Path, content: bytes) -> Path:
    """The same file with other tensors, of which it holds the right hash."""
    (path.parent / TENSORS).write_bytes(content)
    record = json.loads(path.read_text())
    record["tensors"]["sha256"] = hashlib.sha256(content).hexdigest()
    path.write_text(json.dumps(record))
    return path


def assert_refused(path: Path, message: str) -> None:
    loaded, said = load(path)
    assert loaded is None
    assert_one_sentence(said)
    assert re.search(message, said), said


def test_a_pipe_in_the_place_of_the_tensors_is_refused_at_once(steered):
    (steered.parent / TENSORS).unlink()
    os.mkfifo(steered.parent / TENSORS)
    assert_refused(steered, "edit.tensors.safetensors is not a file; give the intervention's tensors")


def test_a_pipe_in_the_place_of_the_document_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "edit.json")
    assert_refused(tmp_path / "edit.json", "edit.json is not a file; give the intervention file")


def test_a_folder_in_the_place_of_the_tensors_is_refused_and_nothing_stays_open(steered):
    (steered.parent / TENSORS).unlink()
    (steered.parent / TENSORS).mkdir()
    before = os.dup(0)
    os.close(before)
    assert_refused(steered, "edit.tensors.safetensors")
    after = os.dup(0)
    os.close(after)
    # The lowest number that is free.
    assert after == before


def test_a_link_out_of_the_folder_is_refused_and_not_followed(steered, tmp_path):
    (steered.parent / TENSORS).rename(tmp_path / "outside.safetensors")
    (steered.parent / TENSORS).symlink_to("../outside.safetensors")
    assert_refused(steered, "is a link that leaves its folder")


def test_a_link_over_a_folder_out_of_the_folder_is_refused(steered, tmp_path):
    (steered.parent / TENSORS).rename(tmp_path / "outside.safetensors")
    (steered.parent / "up").symlink_to("..")
    (steered.parent / TENSORS).symlink_to("up/outside.safetensors")
    assert_refused(steered, "is a link that leaves its folder")


def test_a_link_inside_the_folder_is_followed(steered):
    (steered.parent / TENSORS).rename(steered.parent / "other.safetensors")
    (steered.parent / TENSORS).symlink_to("other.safetensors")
    loaded, _ = load(steered)
    assert loaded is not None


def test_a_link_to_itself_is_refused(steered):
    (steered.parent / TENSORS).unlink()
    (steered.parent / TENSORS).symlink_to(TENSORS)
    assert_refused(steered, "Could not read the intervention's tensors")


def test_a_name_that_the_file_system_refuses_is_refused(steered):
    record = json.loads(steered.read_text())
    record["tensors"]["file"] = "東" * 200 + ".safetensors"
    steered.write_text(json.dumps(record))
    assert_refused(steered, "Could not read the intervention's tensors")


@pytest.mark.parametrize("name", ["x" * 5000, "a\x00b", "\udc80"], ids=["long", "NUL", "surrogate"])
def test_a_path_that_cannot_be_one_is_refused(tmp_path, name):
    with pytest.raises(UserError, match="Could not read"):
        InterventionFile.load(tmp_path / name)


def test_a_document_that_is_too_large_is_refused_unread(tmp_path):
    path = tmp_path / "edit.json"
    with path.open("wb") as stream:
        stream.truncate(2**40)
    assert_refused(path, f"has {2**40} bytes, more than the {2**25}")


def test_tensors_that_are_too_large_are_refused_unread(steered):
    with (steered.parent / TENSORS).open("wb") as stream:
        stream.truncate(2**40)
    assert_refused(steered, f"has {2**40} bytes, more than the {2**32}")


def test_a_name_that_is_said_twice_after_very_many_others_is_found_quickly(tmp_path):
    pairs = ",".join(f'"{i}":0' for i in range(200_000))
    (tmp_path / "edit.json").write_text(f'{{{pairs},"last":0,"last":1}}')
    assert_refused(tmp_path / "edit.json", "'last' is said twice")


class Payload:
    """What runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("form", ["pickle", "torch"])
def test_pickled_tensors_are_refused_and_not_unpickled(steered, tmp_path, monkeypatch, form):
    monkeypatch.chdir(tmp_path)
    if form == "pickle":
        content = pickle.dumps(Payload())
    else:
        torch.save({"0.vector": torch.ones(WIDTH), "other": Payload()}, tmp_path / "pickled")
        content = (tmp_path / "pickled").read_bytes()
    assert_refused(with_tensors(steered, content), "is not a safetensors file")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("size", [2**60, 2**63, 2**64 - 1, 2**32, 100_000_001])
def test_a_header_of_any_claimed_size_is_refused(steered, size):
    content = size.to_bytes(8, "little") + (steered.parent / TENSORS).read_bytes()[8:]
    assert_refused(with_tensors(steered, content), "is not a safetensors file")


@pytest.mark.parametrize("shape", [[2**60], [2**63], [2**32, 2**32], [-1], [1.5], ["a"], [[1]], None, [0, 2**62]])
def test_a_header_with_any_claimed_shape_is_refused(steered, shape):
    header = json.dumps({"0.vector": {"dtype": "F32", "shape": shape, "data_offsets": [0, 4 * WIDTH]}}).encode()
    content = len(header).to_bytes(8, "little") + header + b"\x00" * 4 * WIDTH
    assert_refused(with_tensors(steered, content), "is not a safetensors file")


@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.int8, torch.bool, torch.complex64, torch.float64, torch.float8_e4m3fn], ids=str
)
def test_tensors_of_other_dtypes_are_refused(steered, dtype):
    content = save({"0.vector": torch.ones(WIDTH).to(dtype)})
    assert_refused(with_tensors(steered, content), f"The tensor '0.vector' of test is {dtype}, not one of")


@pytest.mark.parametrize("architecture", ["topk", "abstopk", "matching_pursuit"])
def test_features_that_a_competing_autoencoder_does_not_have_are_refused(fuzzed, tmp_path, architecture):
    path = tmp_path / "edit.json"
    edit = feature_edit(tmp_path, architecture)
    InterventionFile.of([edit], name="test", model=ModelIdentity.of(fuzzed.network, "tiny")).save(path)
    record = json.loads(path.read_text())
    record["interventions"][0]["layers"][0]["removed"][0] = 40
    path.write_text(json.dumps(record))
    assert_refused(path, "has no feature 40; its features are 0 to 39")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda layer: layer["removed"].__setitem__(0, layer["added"][0]), "has a feature twice"),
        (lambda layer: layer["weights"].update(threshold=layer["weights"]["b_enc"]), "has no weights 'threshold'"),
        (lambda layer: layer["weights"].update(surprise=layer["targets"]), "has no weights 'surprise'"),
    ],
    ids=["twice", "of another architecture", "unknown"],
)
def test_an_autoencoder_with_more_than_its_own_is_refused(fuzzed, tmp_path, change, message):
    path = tmp_path / "edit.json"
    edit = feature_edit(tmp_path, "standard")
    InterventionFile.of([edit], name="test", model=ModelIdentity.of(fuzzed.network, "tiny")).save(path)
    record = json.loads(path.read_text())
    change(record["interventions"][0]["layers"][0])
    path.write_text(json.dumps(record))
    assert_refused(path, message)


def test_an_autoencoder_with_weights_of_several_dtypes_is_refused(fuzzed, tmp_path):
    path = tmp_path / "edit.json"
    edit = feature_edit(tmp_path, "standard")
    InterventionFile.of([edit], name="test", model=ModelIdentity.of(fuzzed.network, "tiny")).save(path)
    tensors = tensors_in((tmp_path / TENSORS).read_bytes())
    tensors["0.0.W_enc"] = tensors["0.0.W_enc"].half()
    assert_refused(with_tensors(path, save(tensors)), r"of the dtypes torch\.float16 and torch\.float32")


@pytest.mark.parametrize(
    "text", [{"a": "\ud800"}, {"\ud800": 1}, {"a": [{"b": ["\udfff"]}]}], ids=["value", "key", "deep"]
)
def test_text_that_cannot_be_written_is_refused_before_it_is_saved(fuzzed, tmp_path, text):
    model = ModelIdentity.of(fuzzed.network, "tiny")
    file = InterventionFile.of([HeadScaling.of([(0, 1)], 0.0)], name="test", model=model, measured=text)
    with pytest.raises(UserError, match="holds text that is not UTF-8"):
        file.save(tmp_path / "edit.json")


@pytest.mark.parametrize("field_of", [lambda r: r, lambda r: r["model"]], ids=["file", "model"])
def test_a_name_that_would_write_over_a_terminal_is_refused(steered, field_of):
    record = json.loads(steered.read_text())
    field_of(record)["name"] = "safe\x1b[2J\nedit"
    steered.write_text(json.dumps(record))
    assert_refused(steered, r"name: String should match pattern")
