"""What the commands share: options, groups of them, and how commands talk."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import typer
from rich.console import Console

from interp.errors import UserError
from interp.model_names import check_path

if TYPE_CHECKING:
    from interp.asking import Asking

DEFAULT_MODEL = "smollm2-135m"
DEFAULT_RELATION = "capital"
MODEL_HELP = "A registered name (see `conflictscope models`), a local directory or a hub id."

_model_option = partial(typer.Option, rich_help_panel="Model")
asked_option = partial(typer.Option, rich_help_panel="What is asked")

ModelArgument = Annotated[str, typer.Argument(help=MODEL_HELP)]
PromptsArgument = Annotated[
    Path | None, typer.Argument(help="Prompts, one a line: a text, or a JSON object with a field prompt. - is stdin.")
]
MaxNewTokensOption = Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")]
BatchSizeOption = Annotated[int, typer.Option(min=1, help="Prompts per batch.")]
SeedOption = Annotated[int, typer.Option(help="Seed of splits and conflicts built here, and of random choices.")]
SplitOption = Annotated[
    Literal["train", "dev", "test", "all"],
    typer.Option(help="The split to use; edits are learned and chosen on train and dev, and shown on test."),
]
OutOption = Annotated[Path, typer.Option("--out", help="Folder for the results; finished steps in it are reused.")]
RecordingOption = Annotated[Path, typer.Option("--recording", help="A folder that `conflictscope record` wrote.")]
ProbesOption = Annotated[Path, typer.Option("--probes", help="A folder that `conflictscope probe fit` wrote.")]
SaeOption = Annotated[
    str,
    typer.Option(
        "--sae",
        help="SAEs: a model they are shipped for, a folder (sae_lens or sparsify), or RELEASE:ID as sae_lens has them.",
    ),
]
TokensOption = Annotated[
    Literal["last_prompt", "answer"],
    typer.Option(
        help="The tokens that are edited: the prompt's last, or all that predict the answer, as caa always does."
    ),
]
TrustOption = Annotated[
    float | None, typer.Option(help="Setting of the file's dial, from -1 (memory) to 1 (context); else its own.")
]

# Parameters that are files to read, whichever command has them.
_READ = {"config", "data", "file", "files", "path", "plan", "test_data"}

console = Console(stderr=True)


def say(message: str) -> None:
    """Tell people something; results go elsewhere."""
    console.print(message, markup=False, soft_wrap=True, highlight=False)


BlueprintOption = Annotated[
    Path | None, _model_option(help="A JSON file that says what an architecture looks like that is not known here.")
]


def register_blueprint(path: Path | None) -> None:
    """Make an architecture known from here on, if a file of one is given.

    Raises:
        UserError: If the file describes none.
    """
    if path is not None:
        from interp.blueprints import register

        register(path)


@dataclass(frozen=True)
class Model:
    """Which model a command loads, where, and in which dtype."""

    model: Annotated[str, _model_option(help=MODEL_HELP)] = DEFAULT_MODEL
    device: Annotated[str, _model_option(help="auto, cpu, cuda, mps, ...")] = "auto"
    dtype: Annotated[str, _model_option(help="float32, float16 or bfloat16.")] = "float32"
    attention: Annotated[
        str | None, _model_option(help="Who computes attention: eager, sdpa, ...; else what transformers prefers.")
    ] = None
    revision: Annotated[str | None, _model_option(help="Branch, tag or commit on the hub.")] = None
    subfolder: Annotated[str, _model_option(help="Where the checkpoint lies in its directory or repository.")] = ""
    device_map: Annotated[
        str | None, _model_option(help="Spread layers over several devices: auto, balanced or sequential.")
    ] = None
    trust_remote_code: Annotated[
        bool, _model_option("--trust-remote-code", help="Run code that the checkpoint brings along.")
    ] = False
    batch_tokens: Annotated[
        int, _model_option(min=1, help="Tokens run together at most, padding included: the bound of memory.")
    ] = 8192
    blueprint: BlueprintOption = None

    def __post_init__(self) -> None:
        # Before anything is read: files of interventions are checked against the architecture.
        register_blueprint(self.blueprint)

    def load(self) -> Any:
        """Load the model with its tokenizer."""
        # Also where it came from another process, with none of its own.
        self.__post_init__()
        from interp.models import load_model

        return load_model(
            self.model,
            device=self.device,
            dtype=self.dtype,
            attention=self.attention,
            revision=self.revision,
            subfolder=self.subfolder,
            device_map=self.device_map,
            trust_remote_code=self.trust_remote_code,
            batch_tokens=self.batch_tokens,
        )


@dataclass(frozen=True)
class NamedModel(Model):
    """The same, named first."""

    # Without a value, which the group has.
    model: ModelArgument = field()


@dataclass(frozen=True)
class Facts(Model):
    """Which model is asked about which facts."""

    relation: Annotated[list[str] | None, asked_option(help="A relation of the fact tables; repeatable.")] = None
    seed: Annotated[int, asked_option(help="Seed of splits and conflicts built here, and of random choices.")] = 0

    def relations(self, default: tuple[str, ...] = (DEFAULT_RELATION,)) -> list[str]:
        """The names of the relations.

        Raises:
            UserError: If one is not known.
        """
        from interp.facts import relation_named

        return list(dict.fromkeys(relation_named(name).name for name in self.relation or default))

    def conflicts(self) -> tuple[Any, Any]:
        """Load the model, and build conflict data from what it knows.

        Raises:
            UserError: If there is no such model or relation.
        """
        from interp.facts import build_conflicts
        from interp.known import remembered_facts

        names, model = self.relations(), self.load()
        return model, build_conflicts(remembered_facts(model, names), seed=self.seed)


@dataclass(frozen=True)
class Form:
    """In which form a model is asked."""

    format: Annotated[
        Literal["completion", "chat", "auto"],
        asked_option(help="Ask prompts as they are, or through the chat template; auto: where the model follows one."),
    ] = "completion"
    system: Annotated[str, asked_option(help="With chats: the system message.")] = ""
    answer_prefix: Annotated[str, asked_option(help="What the answer begins with.")] = ""

    @property
    def asking(self) -> Asking:
        """How questions are asked."""
        from interp.asking import Asking

        return Asking(self.format, self.system, self.answer_prefix)


@dataclass(frozen=True)
class Asked(Form, Facts):
    """Which model is asked what, in which form: facts, or conflict data from a file."""

    data: Annotated[
        Path | None,
        asked_option(help="Conflict data (JSON lines from `conflictscope data`) instead of relations."),
    ] = None
    shots: Annotated[int, asked_option(min=0, help="Answered examples of train before each prompt.")] = 0

    def relations(self, default: tuple[str, ...] = (DEFAULT_RELATION,)) -> list[str]:
        """The names of the relations.

        Raises:
            UserError: If one is not known, or a file is given too.
        """
        if self.data is not None and self.relation:
            raise UserError("Give --data or --relation, not both.")
        return super().relations(default)

    def conflicts(self) -> tuple[Any, Any]:
        """Load the model, and load conflict data from the file or build it from what the model knows.

        Raises:
            UserError: If both a file and relations are given, or one of them cannot be loaded.
        """
        from interp.conflicts import ConflictSet

        self.relations()
        if self.data is None:
            model, conflicts = super().conflicts()
        else:
            conflicts = ConflictSet.load(self.data)
            model = self.load()
        return model, self.asking.asked(model, self.model, conflicts)

    def longest_answer(self, model: Any, asked: Any, wanted: int | None = None) -> int:
        """How many tokens an answer has at most: as many as are wanted, else as many as the expected answers take."""
        if wanted is not None:
            return wanted
        from interp.evaluation import room_for_answers

        return room_for_answers(model, asked, self.asking.answer_tokens(model, self.model))

    @property
    def asking(self) -> Asking:
        """How questions are asked."""
        return replace(super().asking, shots=self.shots, seed=self.seed)


def with_groups(command: Callable[..., None]) -> Callable[..., None]:
    """Let a command take groups of options: the fields of every dataclass among its parameters become options."""
    parameters = inspect.signature(command, eval_str=True).parameters
    groups: dict[str, Any] = {name: p.annotation for name, p in parameters.items() if is_dataclass(p.annotation)}

    @wraps(command)
    def flat(**given: Any) -> None:
        # Before any library that takes seconds to import.
        for name in _READ & given.keys():
            _check_there(given[name])
        if isinstance(given.get("model"), str):
            check_path(given["model"])
        for name, group in groups.items():
            given[name] = group(**{field.name: given.pop(field.name) for field in fields(group)})
        command(**given)

    options = [
        option
        for name, p in parameters.items()
        for option in (_options(groups[name]) if name in groups else [p.replace(kind=p.KEYWORD_ONLY)])
    ]
    flat.__signature__ = inspect.Signature(options)  # pyright: ignore[reportAttributeAccessIssue]
    flat.__annotations__ = {}
    return flat


def _check_there(given: Path | list[Path] | None) -> None:
    for path in [given] if isinstance(given, Path) else given or ():
        if str(path) != "-" and not path.exists():
            raise UserError(f"There is no {path}; check the path.")


def _options(group: Any) -> list[inspect.Parameter]:
    kinds = get_type_hints(group, include_extras=True)
    kind, none = inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.empty
    return [
        inspect.Parameter(f.name, kind, default=none if f.default is MISSING else f.default, annotation=kinds[f.name])
        for f in fields(group)
    ]
