"""Say in plain values what a study asks of which model, so that any process can make the same lab from them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator
from torch import nn

from conflictscope import __version__
from conflictscope.study.data import Prompts, fact_prompts, file_prompts
from conflictscope.study.lab import BUDGETS, Lab
from interp.asking import Asking
from interp.conflicts import ConflictSet
from interp.evaluation import room_for_answers
from interp.fingerprints import fingerprint
from interp.inputs import BATCH_TOKENS
from interp.models import load_model
from interp.records import Records
from interventions.identity import Strict

if TYPE_CHECKING:
    from interp.sae import SparseAutoencoder

SUBJECTS, QUICK_SUBJECTS = 40, 12
_VERSION = re.compile(r"^_?[A-Z_]*VERSION = .+$", re.MULTILINE)
# Files up to this size are read whole, some .1 s.
_READ_BYTES = 64 * 1024**2
_PACKAGES = ("interp", "probes", "interventions", "conflictscope")


def digest_of(said: Sequence[str], files: Sequence[Path]) -> str:
    """Hash what decides a result: words, files and folders that are there, and the versions of the code.

    Of small files it is what they hold, so that a copy on another day or machine is the same; of others, which are
    weights, size and time say enough.
    """
    held = [
        (str(file), _held(file))
        for path in files
        if path.exists()
        for file in (sorted(path.rglob("*")) if path.is_dir() else [path])
        if file.is_file()
    ]
    return hashlib.sha256(repr((list(said), held, _versions(), __version__)).encode()).hexdigest()[:12]


def _held(file: Path) -> str | tuple[int, int]:
    about = file.stat()
    if about.st_size > _READ_BYTES:
        return about.st_size, about.st_mtime_ns
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


@cache
def _versions() -> list[str]:
    """The versions of what records keep, whatever is imported."""
    root = Path(__file__).parents[2]
    files = (file for package in _PACKAGES for file in sorted((root / package).rglob("*.py")))
    return [found for file in files for found in _VERSION.findall(file.read_text(encoding="utf-8"))]


class ModelSetting(Strict):
    """Which model is loaded, where, and in which dtype: the arguments of ``interp.models.load_model``."""

    name: str
    device: str = "auto"
    dtype: str = "float32"
    attention: str | None = None
    revision: str | None = None
    subfolder: str = ""
    device_map: str | None = None
    trust_remote_code: bool = False
    batch_tokens: int = Field(BATCH_TOKENS, ge=1)
    blueprint: str | None = None

    def load(self) -> nn.Module:
        """Load the model with its tokenizer.

        Raises:
            UserError: If it cannot be loaded.
        """
        if self.blueprint is not None:
            from interp.blueprints import register

            register(Path(self.blueprint))
        return load_model(**self.model_dump(exclude={"blueprint"}))


class DataSetting(Strict):
    """What a model is asked, in which form, and how much of it.

    Attributes:
        name: What the data is called.
        relations: Relations of the fact tables, where no file is given.
        data: A file of conflict data, or a public data set.
        data_format: Its public format; ``None`` is conflict data.
        unknown_too: Whether facts that the model does not know closed-book are asked too.
        most_words: Words of a prompt at most, where data is given; longer ones are left out.
        subjects: Subjects of each relation to learn from, and to test on, at most.
        families: In how many families made from parts (``interp.families``) each fact is learned from, of each variant;
            test is then in families that share no part with these. 0 takes the phrasings of the fact tables.
        leave_out: The relation that is tested on, and not learned from.
        test_data: The file that is tested on instead.
        test_format: Its public format.
        format, system, answer_prefix, shots: How questions are asked, see ``interp.asking.Asking``.
    """

    name: str
    relations: tuple[str, ...] = Field((), strict=False)
    data: str | None = None
    data_format: str | None = None
    unknown_too: bool = False
    most_words: int | None = Field(None, ge=1)
    subjects: int = Field(SUBJECTS, ge=4)
    families: int = Field(0, ge=0)
    leave_out: str | None = None
    test_data: str | None = None
    test_format: str | None = None
    format: Literal["completion", "chat", "auto"] = "completion"
    system: str = ""
    answer_prefix: str = ""
    shots: int = Field(0, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _called(cls, said: Any) -> Any:
        """The data with its name: that of the relations, of the public format, or of the file, with its bound."""
        if not isinstance(said, dict) or "name" in said:
            return said
        relations, format = said.get("relations"), said.get("data_format")
        named = "+".join(map(str, relations)) if isinstance(relations, (list, tuple)) and relations else None
        name = named or format or Path(str(said.get("data"))).stem
        most = said.get("most_words")
        return {"name": name if most is None else f"{name}, up to {most} words", **said}

    @model_validator(mode="after")
    def _fits_together(self) -> DataSetting:
        if (self.data is None) == (not self.relations):
            raise ValueError(f"{self.name} needs either relations or data, the name of a file; give one of them")
        if self.data is None and (self.data_format is not None or (self.of_files and self.test_data is None)):
            raise ValueError("data_format, unknown_too and most_words belong to data; give a file, or leave them out")
        if self.leave_out and self.relations and (len(self.relations) < 2 or self.leave_out not in self.relations):
            raise ValueError(f"leave_out must be one of two or more relations, not {self.leave_out}; give another")
        as_it_is = ("completion", "", "", 0)
        if self.families and (self.data or (self.format, self.system, self.answer_prefix, self.shots) != as_it_is):
            raise ValueError("families belong to relations, and say themselves how is asked; leave out the rest")
        if self.leave_out is not None and self.test_data is not None:
            raise ValueError("leave_out and test_data do not go together; give one of them")
        if self.test_format is not None and self.test_data is None:
            raise ValueError("test_format belongs to test_data; give a file, or leave it out")
        return self

    @property
    def of_files(self) -> bool:
        """Whether something is said that only prompts of a file can follow."""
        return self.unknown_too or self.most_words is not None

    def asking(self, seed: int) -> Asking:
        """How questions are asked."""
        return Asking(self.format, self.system, self.answer_prefix, self.shots, seed)

    def prompts(self, model: nn.Module | None, name: str, records: Records, *, seed: int, most: int) -> Prompts:
        """Get the prompts: about facts of the tables that the model knows, or from the file.

        Args:
            model: The model, or a bridge around it; ``None`` takes all facts as known, asked as they are written.
            name: What it was loaded by.
            records: Where what it knows is kept.
            seed: Decides splits, subjects and conflicts.
            most: Subjects of each relation at most.

        Raises:
            UserError: If the file cannot be read, a relation is not known, or the model knows too little.
        """
        how = self.asking(seed)
        asked: Callable[[ConflictSet], ConflictSet] = partial(how.asked, model, name) if model else _as_is

        def of_file(file: str, format: str | None) -> Prompts:
            options = {"unknown_too": self.unknown_too, "most_words": self.most_words, "asked": asked, "format": format}
            if model is not None:
                options["least_tokens"] = how.answer_tokens(model, name)
            return file_prompts(model, Path(file), records, subjects=most, seed=seed, **options)

        if self.data is None:
            options = {"families": self.families, "asked": asked}
            prompts = fact_prompts(model, self.relations, records, subjects=most, seed=seed, **options)
        else:
            prompts = of_file(self.data, self.data_format)
        if self.leave_out is not None:
            return prompts.left_out(self.leave_out)
        return prompts if self.test_data is None else prompts.tested_on(of_file(self.test_data, self.test_format))


def _as_is(conflicts: ConflictSet) -> ConflictSet:
    return conflicts


class StudySetting(Strict):
    """One study: a model, what it is asked, and how much damage is allowed.

    Attributes:
        model: The model.
        data: What it is asked.
        seed: Decides splits, subjects, conflicts, and all that is drawn at random.
        quick: Whether little of everything is used: a check that all runs, not a measurement.
        budget: Damage allowed on dev without a context and on text: mean nats of KL divergence.
        context_budget: The same for prompts with a context that agrees or is about something else.
        sae: Where autoencoders of the model are, as ``interp.sae.load_saes`` takes it.
        abilities: Whether agreement, order, copying and sums (``interp.abilities``) are asked too, as damage.
    """

    model: ModelSetting
    data: DataSetting
    seed: int = 0
    quick: bool = False
    budget: float = Field(BUDGETS["none"], gt=0)
    context_budget: float = Field(BUDGETS["aligned"], gt=0)
    sae: str | None = None
    abilities: bool = False

    @property
    def budgets(self) -> dict[str, float]:
        """The damage that is allowed on dev, by guard."""
        named = {"none": self.budget, "neutral": self.budget}
        return {**named, "aligned": self.context_budget, "irrelevant": self.context_budget}

    @property
    def digest(self) -> str:
        """A hash of all that decides it: what is said, what files hold, and the versions of the code."""
        files = (self.model.name, self.model.blueprint, self.data.data, self.data.test_data, self.sae)
        return digest_of([self.model_dump_json()], [Path(file) for file in files if file])

    def lab(self, records: Path, model: nn.Module | None = None) -> Lab:
        """Make the lab: load the model, and get its prompts.

        Args:
            records: The folder where results are kept.
            model: The model, where it is loaded already.

        Raises:
            UserError: If something cannot be loaded, or the model knows too little.
        """
        model = self.model.load() if model is None else model
        kept = Records(records, model=fingerprint(model))
        prompts = self.prompts(model, kept)
        least = self.data.asking(self.seed).answer_tokens(model, self.model.name)
        return Lab(
            model,
            self.model.name,
            prompts,
            kept,
            seed=self.seed,
            quick=self.quick,
            budgets=self.budgets,
            saes=self._saes,
            new_tokens=room_for_answers(model, prompts.test, least),
            abilities=self.abilities,
        )

    def prompts(self, model: nn.Module | None, records: Records) -> Prompts:
        """Get the prompts; see ``DataSetting.prompts``."""
        most = min(self.data.subjects, QUICK_SUBJECTS) if self.quick else self.data.subjects
        found = self.data.prompts(model, self.model.name, records, seed=self.seed, most=most)
        found = replace(found, name=self.data.name)
        return found.few(self.seed) if self.quick else found

    def _saes(self) -> Sequence[SparseAutoencoder]:
        from interp.sae import load_saes

        return load_saes(self.sae or self.model.name)
