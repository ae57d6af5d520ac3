"""Every code block of the README and of the documentation is run, or checked as far as it can be.

Python      Runs, block after block of a page in one namespace. ``smollm2-135m`` is a tiny random model in a cache of
            its own, which knows nothing: ``known_facts`` therefore gives eighteen facts. Names that a page takes from
            its reader come from ``_given``.
Commands    ``conflictscope``, ``python -m`` and ``make`` lines must parse: their commands, options, arguments, modules
            and targets exist and none that is needed is missing. Those in ``_RUN`` really run, on tiny inputs; the
            others take minutes, a server, a cluster or a browser, and are not run. Bodies for the server are read by
            its own models, extras of ``pip install`` must exist. Options for harnesses, which are not installed, are
            those in the source of what they ask.
JSON, YAML  Is read by the project's own readers.
"""

from __future__ import annotations

import ast
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from urllib.parse import urlparse

import pytest
import torch
import typer
import yaml
from markdown_it import MarkdownIt
from pydantic import TypeAdapter, ValidationError

from conflictscope.cli import app, main
from conflictscope.cli.inputs import read_prompts
from conflictscope.serve.requests import ChatRequest, CompletionRequest
from conflictscope.study.comparison import Comparison
from interp import facts, formats, known
from interp.activations import record
from interp.anatomy import Anatomy
from interp.conflicts import ConflictSet
from interp.facts import Fact, build_conflicts, usable_facts
from interp.files import write_json
from interp.fingerprints import fingerprint
from interp.models import load_checkpoint, load_model
from interp.sae import SparseAutoencoder
from interventions.config import AnyEntry, InterventionFile
from interventions.dial import DialPoint, DialScale, TrustDial
from interventions.export.lora import write_adapters
from interventions.gate import ConflictGate
from interventions.heads import HeadScaling
from interventions.identity import ModelIdentity
from interventions.steering import Steering
from probes.detector import ConflictDetector
from probes.linear import ProbeSet
from tests.conflictscope.board_samples import write_study
from tests.tiny import tiny_conflicts, tiny_tokenizer

# What the command line complains with; typer does not name it itself.
UsageError: Any = typer.BadParameter.__base__
ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FACTS = 18

_RUN = {
    *("models", "plan", "inspect", "generate", "ask", "evaluate", "attribute"),
    *("data build", "data inspect", "data convert", "data tasks"),
    *("probe detect", "dial apply", "steer apply", "leaderboard"),
}
_SHELL = (
    *("conflictscope", "make", "python", "pip", "curl", "echo", "printf"),
    *("llama-server", "lm_eval", "inspect", "ray"),
)
_NQ_SWAP = {
    "question": "What is the capital of Japan?",
    "org_context": "Tokyo is the capital of Japan.",
    "sub_context": "Lima is the capital of Japan.",
    "org_answer": ["Tokyo"],
    "sub_answer": ["Lima"],
}


class Block(NamedTuple):
    """A code block, the line it starts on, and its language; indented blocks are shell or text."""

    line: int
    language: str
    text: str


def blocks_of(page: Path) -> list[Block]:
    found = []
    for token in MarkdownIt().parse(page.read_text(encoding="utf-8")):
        if token.type == "fence" and token.map:
            found.append(Block(token.map[0] + 2, token.info.split()[0] if token.info else "text", token.content))
        elif token.type == "code_block" and token.map:
            is_shell = token.content.split()[0] in _SHELL
            found.append(Block(token.map[0] + 1, "shell" if is_shell else "text", token.content))
    return found


# What a reader has


@pytest.fixture(scope="module")
def prepared(tiny_directories: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which every command of the pages finds what it reads, for a tiny model."""
    root = tmp_path_factory.mktemp("reader")
    llama = shutil.copytree(tiny_directories["llama"], root / "chatting")
    (llama / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}\n{% endfor %}")
    for place in ("cache/models/smollm2-135m", "path/to/model", "my-model"):
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        (root / place).symlink_to(llama)
    model = load_model(str(llama), device="cpu")
    identity = ModelIdentity.of(model, "smollm2-135m")
    edit = HeadScaling.of([(1, 1), (2, 0)], 0.0)
    points = tuple(DialPoint(t, 0.5 - 0.4 * t, 0.5 + 0.4 * t) for t in (-1.0, 0.0, 1.0))
    vector = torch.ones(Anatomy(model).d_model)
    for place, part in {
        "towards_context.json": edit,
        "out/demo/interventions/towards_context.json": edit,
        "out/demo/interventions/towards_memory.json": edit,
        "out/demo/interventions/pruning-towards_context.json": edit,
        "out/dial/dial.json": TrustDial((DialScale(1, 1, 2.0, 0.5),), 0.0, points),
        "out/gate/gated.json": ConflictGate("block", 0, vector, 0.0, 0.0, (edit,)),
        "out/sae-diff/layer_20.json": Steering(1, vector, tokens="all"),
        "out/steer/interventions/actadd-towards_context.json": Steering(1, vector),
    }.items():
        InterventionFile.of([part], name="edit", model=identity, towards="context").save(root / place)
    dial = InterventionFile.load(root / "out/dial/dial.json")
    write_adapters(str(llama), dial, root / "out/lora", name="dial", trusts=(1.0, 0.5, -1.0))
    _save_probes(model, root / "out/probes")
    for place in ("conflicts.jsonl", "out/conflicts.jsonl"):
        tiny_conflicts().save(root / place)
    (root / "nq-swap.jsonl").write_text(json.dumps(_NQ_SWAP))
    (root / "prompts.txt").write_text("The capital of Peru is\nThe capital of Chile is\n")
    towns = ["question,context,answer,memory", *(f"Where is {n}?,{n} is in A{n}.,A{n},B{n}" for n in range(40))]
    (root / "mine.csv").write_text("\n".join(towns))
    for part in ("Static", "Temporal", "Disputable"):
        shutil.copy(ROOT / "tests/interp/fixtures/formats/dynamicqa.csv", root / f"{part}_final.csv")
    shutil.copytree(ROOT / "tests/interp/fixtures/ragtruth", root / "RAGTruth/dataset")
    write_study(root / "out/studies/capital")
    return root


def _save_probes(model: Any, folder: Path) -> None:
    examples = list(tiny_conflicts())
    site = Anatomy(model).site("block", 1)
    labels = ["aligned" if i % 2 else "conflict" for i in range(len(examples))]
    features = record(model, [e.prompt for e in examples], [site], "last")
    probes = ProbeSet.fit({site: features[site]}, labels, validation=[i % 4 > 1 for i in range(len(examples))])
    probes.save(folder / "conflict.safetensors")
    settings = {"model": {"name": "smollm2-135m", "fingerprint": fingerprint(model)}}
    ConflictDetector(probes[site], 0.5, None, settings).save(folder / "detector")
    write_json(folder / "fit.json", {})


@pytest.fixture
def reader(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh copy of that folder, to work in."""
    shutil.copytree(prepared, tmp_path, symlinks=True, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CONFLICTSCOPE_CACHE", str(tmp_path / "cache"))
    for module in (facts, known):
        monkeypatch.setattr(module, "known_facts", _thirty_facts)
    return tmp_path


def _thirty_facts(_: Any, relation: str, **__: Any) -> tuple[Fact, ...]:
    return usable_facts(relation)[:FACTS]


def _given(page: Path, model_directory: Path) -> dict[str, Any]:
    """What the blocks of a page may take as there already."""
    if page.name in ("index.md", "intervention_file.md"):
        return {}
    network, tokenizer = load_checkpoint(str(model_directory))
    if page.name == "README.md":
        # There "..." stands for the reader's own arguments.
        network.generate = lambda *_: None
        return {"any_transformers_model": network, "its_tokenizer": tokenizer}
    torch.manual_seed(0)
    model = load_model(str(model_directory), device="cpu")
    width, features = Anatomy(model).d_model, 64
    weights = {"W_enc": torch.randn(width, features), "b_enc": torch.zeros(features)}
    weights |= {"W_dec": torch.randn(features, width), "b_dec": torch.zeros(width)}
    return {
        "model": model,
        "conflicts": build_conflicts({"capital": usable_facts("capital")[:FACTS]}),
        "tokenizer": tiny_tokenizer(),
        "sae": SparseAutoencoder(layer=1, architecture="standard", weights=weights, name="tiny"),
        "activations": torch.randn(20, features).clamp(min=0),
    }


# Python


def run_python(block: Block, page: Path, namespace: dict[str, Any]) -> None:
    # Empty lines before it make line numbers in a traceback those of the page.
    lines = "\n" * (block.line - 1) + block.text
    exec(compile(lines, str(page), "exec", dont_inherit=True), namespace)


# Commands


def parsed(command: Any, name: str, arguments: list[str]) -> str:
    """The whole name of the command that the arguments are for; raises what the command line would complain about."""
    context = command.make_context(name, list(arguments))
    if not hasattr(command, "commands"):
        return name
    part, inner, rest = command.resolve_command(context, [*getattr(context, "_protected_args", []), *context.args])
    return f"{name} {part}" if inner is None else parsed(inner, f"{name} {part}", rest)


def pipelines(text: str) -> Iterator[list[list[str]]]:
    """The commands of a shell block, those that are piped together in one list."""
    # shlex would take the end of the line for a part of the comment.
    plain = re.sub(r"\s#[^'\"\n]*$", "", text.replace("\\\n", " "), flags=re.MULTILINE)
    lexer = shlex.shlex(plain, posix=True, punctuation_chars="|\n")
    lexer.whitespace, lexer.whitespace_split, lexer.commenters = " \t\r", True, ""
    commands: list[list[str]] = [[]]
    for word in [*lexer, "\n"]:
        if word == "|":
            commands.append([])
        elif not word.strip("\n"):
            if commands[-1]:
                yield commands
            commands = [[]]
        else:
            commands[-1].append(word)


def check_shell(block: Block, run: Callable[[list[str], str], None]) -> None:
    for commands in pipelines(block.text):
        piped = ""
        for program, *arguments in commands:
            if program in ("echo", "printf"):
                piped = subprocess.run([program, *arguments], capture_output=True, text=True, check=True).stdout
            elif program == "conflictscope":
                name = parsed(typer.main.get_command(app), "conflictscope", arguments)
                if name.removeprefix("conflictscope ") in _RUN and "--ray" not in arguments:
                    run(arguments, piped)
            else:
                _OTHERS[Path(program).name](arguments)


def _python(arguments: list[str]) -> None:
    if arguments[:2] == ["-m", "venv"]:
        return
    assert arguments[0] == "-m", f"python {' '.join(arguments)} is checked by nothing"
    if arguments[1] == "conflictscope.elsewhere.lm_eval":
        _lm_eval(arguments[2:])
        return
    alone = typer.Typer()
    alone.command()(import_module(arguments[1]).main)
    parsed(typer.main.get_command(alone), arguments[1], arguments[2:])


def _make(targets: list[str]) -> None:
    rules = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(targets) <= set(rules)


def _pip(arguments: list[str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert arguments[0] == "install"
    if arguments[1:] in (["vllm"], ["peft"], ["llama-cpp-python"]):
        return
    wanted = re.fullmatch(r"(\.|conflictscope)(?:\[([\w,-]+)\])?", arguments[-1])
    assert wanted
    assert set(filter(None, (wanted[2] or "").split(","))) <= project["optional-dependencies"].keys()


def _curl(arguments: list[str]) -> None:
    bodies: dict[str, type[CompletionRequest | ChatRequest]] = {
        "/v1/completions": CompletionRequest,
        "/v1/chat/completions": ChatRequest,
    }
    url = next(word for word in arguments if "localhost" in word)
    if url.endswith("/completion"):
        assert json.loads(arguments[arguments.index("-d") + 1])["prompt"]  # llama.cpp's own
        return
    model = bodies[urlparse(f"http://{url.removeprefix('http://')}").path]
    model.model_validate_json(arguments[arguments.index("-d") + 1])


def _llama_server(arguments: list[str]) -> None:
    assert {"-m", "--lora"} <= set(arguments)


def _ray(arguments: list[str]) -> None:
    assert arguments[0] in ("up", "dashboard", "job")
    if arguments[0] == "job":
        _, *command = arguments[arguments.index("--") + 1 :]
        parsed(typer.main.get_command(app), "conflictscope", command)
    else:
        assert (ROOT / arguments[1]).is_file()


def _lm_eval(arguments: list[str]) -> None:
    options = dict(pairwise(arguments))
    given = {part.partition("=")[0] for part in options["--model_args"].split(",")}
    known = {"conflictscope": _options_of("lm_eval"), "hf": {"pretrained", "peft", "dtype"}}
    assert given <= known[options["--model"]]
    assert options["--tasks"]


def _inspect(arguments: list[str]) -> None:
    assert arguments[:2] == ["eval", "task.py"]
    assert dict(pairwise(arguments))["--model"].startswith("conflictscope/")
    given = {value.partition("=")[0] for name, value in pairwise(arguments) if name == "-M"}
    assert given <= _options_of("inspect_ai")


def _options_of(module: str) -> set[str]:
    """What the model that a harness asks takes, read from its source: the harness is not installed here."""
    tree = ast.parse((ROOT / f"conflictscope/elsewhere/{module}.py").read_text(encoding="utf-8"))
    (begin,) = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "__init__")
    return {argument.arg for argument in begin.args.args}


_OTHERS: dict[str, Callable[[list[str]], None]] = {
    "python": _python,
    "make": _make,
    "pip": _pip,
    "curl": _curl,
    "llama-server": _llama_server,
    "lm_eval": _lm_eval,
    "inspect": _inspect,
    "ray": _ray,
}


# JSON and text


def check_json(block: Block, folder: Path) -> None:
    for line in block.text.splitlines():
        fields = json.loads(line)
        if "memory_answers" in fields:
            (folder / "block.jsonl").write_text(line)
            ConflictSet.load(folder / "block.jsonl")
        elif "prompt" in fields:
            assert list(read_prompts([line], 1))
        else:
            TypeAdapter(AnyEntry).validate_json(line)


@pytest.mark.parametrize("document", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_code_blocks(document, reader, tiny_directories, monkeypatch):
    def run(arguments: list[str], piped: str) -> None:
        monkeypatch.setattr(sys, "argv", ["conflictscope", *arguments])
        monkeypatch.setattr(sys, "stdin", io.StringIO(piped))
        with pytest.raises(SystemExit) as end:
            main()
            sys.exit(0)
        assert not end.value.code, f"conflictscope {' '.join(arguments)} ended with {end.value.code}"

    # What a page registers is forgotten after it.
    monkeypatch.setitem(formats.FORMATS, "trivia", formats.FORMATS["popqa"])
    # A module, because classes look for their own.
    module = ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    vars(module).update(_given(document, tiny_directories["llama"]))
    for block in blocks_of(document):
        try:
            if block.language == "python":
                run_python(block, document, vars(module))
            elif block.language == "shell":
                check_shell(block, run)
            elif block.language in ("json", "jsonl"):
                check_json(block, reader)
            elif block.language == "yaml":
                Comparison.model_validate(yaml.safe_load(block.text))
            else:
                assert block.language == "text", f"nothing checks blocks of {block.language}"
        except BaseException as error:
            error.add_note(f"in the block at {document.relative_to(ROOT)}, line {block.line}")
            raise


# The checks refuse what they should


@pytest.mark.parametrize(
    ("line", "error", "said"),
    [
        ("conflictscope evalute --by kind", UsageError, "No such command 'evalute'"),
        ("conflictscope evaluate --colour red", UsageError, "No such option: --colour"),
        ("conflictscope generate smollm2-135m", UsageError, "Missing parameter: prompt"),
        ("conflictscope attribute --method guessing", UsageError, "'guessing' is not one of"),
        ("echo prompt | conflictscope probe detcet", UsageError, "No such command 'detcet'"),
        ("python -m benchmarks.nothing", ModuleNotFoundError, "benchmarks.nothing"),
        ("python -m benchmarks.path_patching --colour", UsageError, "No such option: --colour"),
        ("make coffee", AssertionError, ""),
        ("pip install 'conflictscope[everything]'", AssertionError, ""),
        (
            """curl localhost:8000/v1/completions -d '{"prompt": "Hi", "colour": "red"}'""",
            ValidationError,
            "Extra inputs are not permitted",
        ),
        ("wget something", KeyError, "wget"),
    ],
)
def test_a_wrong_command_is_found(line, error, said):
    with pytest.raises(error) as found:
        check_shell(Block(1, "shell", line), lambda *_: None)
    assert said in str(found.value)


def test_commands_are_read_as_a_shell_reads_them():
    text = "make demo # long\necho 'a | b' | conflictscope x \\\n    --y\n\nmake test\n"
    assert list(pipelines(text)) == [
        [["make", "demo"]],
        [["echo", "a | b"], ["conflictscope", "x", "--y"]],
        [["make", "test"]],
    ]
