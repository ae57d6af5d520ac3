"""Activations on disk: recorded shard by shard, read back memory-mapped.

A store is a folder:

    store.json                          what was recorded: model, data, seed, sites, positions, dtype
    shards/00000/activations.safetensors    one tensor for each site, one row for each recorded token
    shards/00000/index.parquet              the same rows: prompt, token, labels and metadata of the example

A shard appears whole or not at all, and which prompts it holds and in which batches they run depends on the data
alone. A recording that is killed and started again therefore ends with the same bytes as an undisturbed one.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import polars as pl
import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from interp.activations import Collected, Position, PromptSource, collected_activations, observations
from interp.anatomy import Anatomy, Observation
from interp.conflicts import ConflictSet
from interp.errors import UserError
from interp.evaluation import measure_usage, room_for_answers
from interp.files import atomic_directory, read_json, write_json, write_parquet
from interp.fingerprints import fingerprint
from interp.generation import BATCH_SIZE
from interp.inputs import batch_tokens_of
from interp.models import DTYPES
from interp.progress import counted

SHARD_PROMPTS = 256
SHARD_BYTES = 256 * 2**20

_FORMAT = "conflictscope-activations"
# Raised when the same prompts would be recorded otherwise.
_VERSION = 2


class ActivationStore(Mapping[str, Tensor]):
    """Recorded activations in a folder: a mapping from site to its values, read from memory-mapped shards.

    Args:
        path: The folder.

    Attributes:
        path: The folder.
        basis: What was recorded, as ``store.json`` says: ``model`` (``name``, ``fingerprint``), ``data`` (``name``,
            ``digest``, ``prompts``), ``seed``, ``sites``, ``positions``, ``dtype``, ``batch_size``, ``batch_tokens``,
            ``answers``.

    Raises:
        UserError: If the folder is not a store.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not (self.path / "store.json").is_file():
            raise UserError(f"{path} is not an activation store; give a folder that `conflictscope record` wrote.")
        self.basis: dict[str, Any] = read_json(self.path / "store.json")
        if not isinstance(self.basis, dict) or (self.basis.get("format"), self.basis.get("version")) != (
            _FORMAT,
            _VERSION,
        ):
            raise UserError(f"{path}/store.json is not of format {_FORMAT}, version {_VERSION}; record it again.")

    @property
    def sites(self) -> list[str]:
        """The recorded sites."""
        return list(self.basis["sites"])

    @property
    def complete(self) -> bool:
        """Whether all prompts have been recorded."""
        return self._recorded() == self.basis["data"]["prompts"]

    def check(self, model: nn.Module) -> None:
        """Refuse to go on if the recording has not finished, or is of another model.

        Raises:
            UserError: If so.
        """
        if not self.complete:
            raise UserError(f"The recording in {self.path} has not finished; run the command that made it again.")
        if self.basis["model"]["fingerprint"] != fingerprint(model):
            raise UserError(
                f"{self.path} is a recording of {self.basis['model']['name']} with other weights or in another dtype; "
                "record this model."
            )

    @cached_property
    def index(self) -> pl.DataFrame:
        """One row for each row of the values, as far as recorded: ``prompt``, ``position``, ``token``, metadata."""
        parts = [pl.read_parquet(shard / "index.parquet") for shard in self._shards()]
        return pl.concat(parts, how="vertical_relaxed") if parts else pl.DataFrame()

    def __getitem__(self, site: str) -> Tensor:
        return self.read(site)

    def __contains__(self, site: object) -> bool:
        return site in self.sites

    def __iter__(self) -> Iterator[str]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def read(self, site: str, rows: Sequence[int] | None = None) -> Tensor:
        """The values of one site, ``(n_rows, d)``, or only some rows of it; other rows are not read from disk.

        Raises:
            UserError: If the site was not recorded, nothing was, or there is no such row.
        """
        parts, first = [], 0
        numbers = None if rows is None else torch.as_tensor(rows, dtype=torch.long)
        order = []
        for values in self.shards(site):
            if numbers is None:
                parts.append(values)
            else:
                here = ((numbers >= first) & (numbers < first + len(values))).nonzero().flatten()
                parts.append(values[numbers[here] - first])
                order.append(here)
            first += len(values)
        if not parts:
            raise UserError(f"The store {self.path} has no rows yet; run the same `conflictscope record` again.")
        if numbers is not None and len(outside := numbers[(numbers < 0) | (numbers >= first)]):
            raise UserError(f"The store {self.path} has no row {outside[0].item()}; its rows are 0 to {first - 1}.")
        read = torch.cat(parts)
        return read if numbers is None else read[torch.cat(order).argsort()]

    def rows(self, numbers: Sequence[int]) -> Mapping[str, Tensor]:
        """A mapping like the store itself, of some rows only; a site is read when it is asked for."""
        return _Rows(self, list(numbers))

    def shards(self, site: str) -> Iterator[Tensor]:
        """The values of one site, shard by shard, each memory-mapped.

        Raises:
            UserError: If the site was not recorded.
        """
        if site not in self.sites:
            raise UserError(f"The site {site!r} was not recorded in {self.path}; recorded are {', '.join(self.sites)}.")
        for shard in self._shards():
            with safe_open(shard / "activations.safetensors", "pt") as tensors:
                yield tensors.get_tensor(site)

    def _shards(self) -> list[Path]:
        """The folders of finished shards, in order."""
        return sorted(p for p in (self.path / "shards").glob("[0-9]*") if p.is_dir())

    def _recorded(self) -> int:
        """How many prompts have been recorded."""
        return sum(len(_prompts_of(shard)) for shard in self._shards())

    @classmethod
    def record(
        cls,
        path: str | Path,
        model: nn.Module,
        prompts: Sequence[str] | ConflictSet,
        sites: Sequence[str],
        positions: Position = "last",
        *,
        name: str,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        answers: bool = False,
        batch_size: int = BATCH_SIZE,
        only: Mapping[int, range] | None = None,
        patience: float = 0,
        progress: str | None = None,
    ) -> ActivationStore:
        """Record activations to a folder, or go on where an earlier call with the same arguments stopped.

        Memory use does not depend on the number of prompts. What is recorded is the model as it is: a store knows its
        weights, but not the interventions on it, so give each edit a folder of its own.

        Several processes may each record some shards at once, into a folder that one of them made with ``only={}``; the
        bytes are those of one process that recorded all.

        Args:
            path: The folder.
            model: The model, or a bridge around it.
            prompts: Texts, or conflict examples.
            sites: Names of sites, for example from ``sites_of``.
            positions: See ``record``.
            name: What the model is called.
            seed: The seed that the data was made with.
            dtype: What to keep.
            answers: Answer each conflict prompt greedily too, and put ``answer`` and ``usage`` into the index.
            batch_size: Prompts per batch.
            only: The shards that are recorded, by their number their prompts, see ``shard_prompts``; ``None`` records
                all.
            patience: Seconds to wait for another process that is recording to the folder; -1 is as long as it takes.
            progress: Label of a progress bar; ``None`` shows none.

        Raises:
            UserError: If the folder holds another recording (the message says what differs), another process is
                writing to it, a site or position does not exist, or a value overflows ``dtype``.
        """
        source = PromptSource(model, prompts, positions)
        source.check()
        where = observations(model, sites)
        if answers and source.examples is None:
            raise UserError("Answers are judged by what the examples say; give conflict examples, not texts alone.")
        basis = {
            "format": _FORMAT,
            "version": _VERSION,
            "model": {"name": name, "fingerprint": fingerprint(model)},
            "data": {
                "name": prompts.name if isinstance(prompts, ConflictSet) else "texts",
                "digest": prompts.digest if isinstance(prompts, ConflictSet) else texts_digest(prompts),
                "prompts": len(source),
            },
            "seed": seed,
            "sites": list(where),
            "positions": positions,
            "dtype": _dtype_name(dtype),
            "batch_size": batch_size,
            "batch_tokens": batch_tokens_of(model),
            "answers": answers,
        }
        folder = Path(path)
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"Could not write {path}: {error.strerror or error}; choose another folder.") from error
        what: dict[str, Any] = {"where": where, "dtype": dtype, "batch_size": batch_size, "answers": answers}
        if only and (folder / "store.json").exists():
            _check(folder, basis)
            cls(folder)._continue(model, source, **what, only=only, progress=progress)
            return cls(folder)
        try:
            with FileLock(folder.parent / f".{folder.name}.lock", timeout=patience):
                _prepare(folder, basis)
                store = cls(folder)
                store._continue(model, source, **what, only=only, progress=progress)
        except Timeout as error:
            raise UserError(f"Another process is recording to {path}; wait for it or choose another folder.") from error
        return cls(folder)

    def _continue(
        self,
        model: nn.Module,
        source: PromptSource,
        where: Mapping[str, Observation],
        dtype: torch.dtype,
        batch_size: int,
        answers: bool,
        only: Mapping[int, range] | None,
        progress: str | None,
    ) -> None:
        if only is not None and not only:
            return
        bytes_per_row = sum(dtype.itemsize * _width(model, o) for o in where.values())
        pending: Future[None] | None = None
        shards = self._ranges(source, bytes_per_row) if only is None else self._some(only)
        recorded = self._recorded() if only is None else 0
        with ThreadPoolExecutor(1) as writer, counted(progress, len(source), recorded) as advance:
            for shard, numbers in shards:
                if shard.exists():
                    continue
                collected = collected_activations(model, source, numbers, where, dtype, batch_size, advance)
                index = _index(model, source, numbers, answers, batch_size)
                if pending is not None:
                    pending.result()
                pending = writer.submit(_write_shard, shard, collected, index)
            if pending is not None:
                pending.result()

    def _ranges(self, source: PromptSource, bytes_per_row: int) -> Iterator[tuple[Path, range]]:
        """Every shard with its prompts; what it holds depends on the data alone."""
        first, number = 0, 0
        while first < len(source):
            shard = self.path / "shards" / f"{number:05d}"
            numbers = _prompts_of(shard) if shard.exists() else _next_shard(source, first, bytes_per_row)
            yield shard, numbers
            first, number = numbers[-1] + 1, number + 1

    def _some(self, only: Mapping[int, range]) -> Iterator[tuple[Path, range]]:
        return ((self.path / "shards" / f"{number:05d}", numbers) for number, numbers in only.items())

    @classmethod
    def shard_prompts(
        cls,
        model: nn.Module,
        prompts: Sequence[str] | ConflictSet,
        sites: Sequence[str],
        positions: Position = "last",
        dtype: torch.dtype = torch.float32,
    ) -> list[range]:
        """Say which prompts each shard holds that ``record`` with these arguments makes."""
        source = PromptSource(model, prompts, positions)
        bytes_per_row = sum(dtype.itemsize * _width(model, o) for o in observations(model, sites).values())
        shards: list[range] = []
        while (first := shards[-1].stop if shards else 0) < len(source):
            shards.append(_next_shard(source, first, bytes_per_row))
        return shards


class _Rows(Mapping[str, Tensor]):
    """Some rows of a store, read when a site is asked for."""

    def __init__(self, store: ActivationStore, numbers: list[int]) -> None:
        self._store, self._numbers = store, numbers

    def __getitem__(self, site: str) -> Tensor:
        return self._store.read(site, self._numbers)

    def __contains__(self, site: object) -> bool:
        return site in self._store

    def __iter__(self) -> Iterator[str]:
        return iter(self._store)

    def __len__(self) -> int:
        return len(self._store)


def _dtype_name(dtype: torch.dtype) -> str:
    for name, known in DTYPES.items():
        if known == dtype:
            return name
    raise UserError(f"Activations are kept as {', '.join(DTYPES)}, not as {str(dtype).removeprefix('torch.')}.")


def texts_digest(texts: Sequence[str]) -> str:
    """What the basis of a recording of texts says about them."""
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()


def _prepare(folder: Path, basis: dict[str, Any]) -> None:
    """Make ``folder`` a store with this basis, or see that it is one, and clear what a killed run left half-written."""
    if (folder / "store.json").exists():
        _check(folder, basis)
    else:
        if folder.exists() and (
            not folder.is_dir() or any(not p.name.startswith(".store.json.") for p in folder.iterdir())
        ):
            raise UserError(f"{folder} exists already and is not an activation store; give the name of a new folder.")
        write_json(folder / "store.json", basis)
    for leftover in (*folder.glob(".store.json.*"), *folder.glob("shards/.*")):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def _check(folder: Path, basis: dict[str, Any]) -> None:
    """See that a store has this basis.

    Raises:
        UserError: If it has not; the message says what differs.
    """
    found = ActivationStore(folder).basis
    for key, value in basis.items():
        if found.get(key) != value:
            raise UserError(
                f"{folder} holds another recording: its {key} is {_short(found.get(key))}, not {_short(value)}; "
                "give the name of a new folder, or the arguments it was recorded with."
            )


def _prompts_of(shard: Path) -> range:
    """The prompts that a finished shard holds."""
    ends = [pl.col("prompt").min().alias("first"), pl.col("prompt").max().alias("last")]
    first, last = pl.scan_parquet(shard / "index.parquet").select(ends).collect().row(0)
    return range(first, last + 1)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _width(model: Any, observation: Observation) -> int:
    anatomy = Anatomy(model)
    return anatomy.d_model if observation.n_heads is None else anatomy.n_heads * anatomy.d_head


def _next_shard(source: PromptSource, first: int, bytes_per_row: int) -> range:
    """The prompts of the next shard: so many that neither their number nor their bytes exceed what a shard holds."""
    numbers = range(first, min(first + SHARD_PROMPTS, len(source)))
    size, count = 0, 0
    for wanted in source.wanted(numbers):
        size += len(wanted.positions) * bytes_per_row
        if count and size > SHARD_BYTES:
            break
        count += 1
    return numbers[:count]


def _index(model: Any, source: PromptSource, numbers: range, answers: bool, batch_size: int) -> pl.DataFrame:
    """The index rows of one shard, in the order of its values."""
    wanted = source.wanted(numbers)
    rows = [
        {"prompt": i, "position": p, "token": w.token_ids[p]}
        for i, w in zip(numbers, wanted, strict=True)
        for p in sorted(w.positions)
    ]
    frame = pl.DataFrame(rows, schema={"prompt": pl.Int64, "position": pl.Int64, "token": pl.Int64})
    if source.examples is None:
        about = pl.DataFrame(
            {"prompt": list(numbers), "id": [str(i) for i in numbers], "text": [w.text for w in wanted]}
        )
        return frame.join(about, on="prompt", how="left", maintain_order="left")
    chosen = [source.examples[i] for i in numbers]
    columns = ("id", "subject", "relation", "template", "kind", "split", "source")
    about = pl.DataFrame({"prompt": list(numbers), **{c: [getattr(e, c) for e in chosen] for c in columns}})
    about = about.with_columns(
        context_answer=pl.Series([next(iter(e.context_answers), None) for e in chosen], dtype=pl.String),
        text=pl.Series([w.text for w in wanted], dtype=pl.String),
    )
    if answers:
        conflicts = tuple(e for e in chosen if e.kind == "conflict")
        schema = {"id": pl.String, "answer": pl.String, "usage": pl.String}
        judged = pl.DataFrame(schema=schema)
        if conflicts:
            asked = ConflictSet("shard", conflicts)
            room = room_for_answers(model, asked)
            usage = measure_usage(model, asked, max_new_tokens=room, batch_size=batch_size)
            judged = usage.frame.select("id", "answer", "usage")
        about = about.join(judged, on="id", how="left", maintain_order="left")
    return frame.join(about, on="prompt", how="left", maintain_order="left")


def _write_shard(folder: Path, collected: Collected, index: pl.DataFrame) -> None:
    activations = collected.result()
    with atomic_directory(folder) as partial:
        write_parquet(partial / "index.parquet", index)
        try:
            save_file(
                {site: values.contiguous() for site, values in activations.items()}, partial / "activations.safetensors"
            )
        except SafetensorError as error:
            raise UserError(
                f"Could not write {folder}: {error}; free some space and record again, which goes on from here."
            ) from error
