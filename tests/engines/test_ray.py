"""A comparison on a real Ray cluster of two workers gives the records of one without, also where workers are killed.

`make engines` runs this alone, since it needs Ray: CONFLICTSCOPE_EVAL_PYTHON names the interpreter of an environment
with ConflictScope and its extra ray.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from conflictscope.study.record import RECORD
from interp.facts import build_conflicts, usable_facts
from tests.tiny import save_tiny

PYTHON = os.environ["CONFLICTSCOPE_EVAL_PYTHON"]
KILLED, SEEDS = 10, 4
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    save_tiny("llama", folder / "llama")
    save_tiny("gpt-neox", folder / "gpt-neox")
    build_conflicts({"capital": usable_facts("capital")[:60]}, seed=0).save(folder / "capitals.jsonl")
    said = {
        "models": [str(folder / "llama"), str(folder / "gpt-neox")],
        "data": [{"data": "capitals.jsonl", "unknown_too": True, "subjects": 12}],
        "methods": ["pruning", "mean_ablation", "caa", "instruction", "adacad"],
        "seeds": list(range(SEEDS)),
    }
    (folder / "plan.yaml").write_text(yaml.safe_dump(said))
    return folder / "plan.yaml"


@pytest.fixture(scope="module")
def alone(plan: Path) -> dict[str, Any]:
    command = [PYTHON, "-m", "conflictscope", "compare", plan, "--out", plan.parent / "alone"]
    subprocess.run(command, env=ONE_THREAD, check=True, capture_output=True, timeout=1200)
    return records(plan.parent / "alone")


def on_ray(plan: Path, out: Path) -> subprocess.Popen[str]:
    command = [PYTHON, "-m", "conflictscope", "compare", plan, "--out", out, "--ray", "local", "--workers", "2"]
    return subprocess.Popen(command, env=ONE_THREAD, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def records(out: Path) -> dict[str, Any]:
    """Every study's record, without what was timed, and the folder's name."""
    found = {}
    for path in sorted(out.glob(f"studies/**/{RECORD}")):
        record = json.loads(path.read_text(encoding="utf-8"))
        conditions = [{**one, "cost": None} for one in record["conditions"]]
        found[str(path.relative_to(out))] = {**record, "conditions": conditions, "command": None}
    return found


def done(out: Path) -> Counter[str]:
    """How often each unit was done; a killed driver may leave half a line."""
    found: Counter[str] = Counter()
    for line in (out / "units.jsonl").read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):
            found[json.loads(line)["id"]] += 1
    return found


def kept(out: Path) -> dict[Path, int]:
    """When everything that units keep was written."""
    return {path: path.stat().st_mtime_ns for path in (out / "records").rglob("*") if path.is_file()}


def workers_of(driver: int) -> list[int]:
    """The processes of workers below a driver."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue

    def is_below(process: int) -> bool:
        while process in parents:
            process = parents[process]
            if process == driver:
                return True
        return False

    def is_worker(process: int) -> bool:
        try:
            return b"ray::_Holder" in Path(f"/proc/{process}/cmdline").read_bytes()
        except OSError:
            return False

    return [process for process in parents if is_below(process) and is_worker(process)]


def test_two_workers_give_the_same_records(plan: Path, alone: dict[str, Any]) -> None:
    out = plan.parent / "two"
    running = on_ray(plan, out)
    said, _ = running.communicate(timeout=1200)
    assert running.returncode == 0, said
    assert len(alone) == 2 * SEEDS
    assert records(out) == alone
    assert set(done(out).values()) == {1}


def test_workers_that_are_killed_change_nothing_and_nothing_is_computed_twice(
    plan: Path, alone: dict[str, Any]
) -> None:
    out, rng = plan.parent / "killed", random.Random(0)
    running = on_ray(plan, out)
    killed = 0
    while running.poll() is None and killed < KILLED:
        time.sleep(rng.uniform(1, 5))
        if (out / "units.jsonl").exists() and (workers := workers_of(running.pid)):
            os.kill(rng.choice(workers), signal.SIGKILL)
            killed += 1
    said, _ = running.communicate(timeout=1200)
    assert running.returncode == 0, said
    assert killed == KILLED
    assert records(out) == alone
    # Each unit was finished once; what is kept stays as it was written, whoever asks for it again.
    assert set(done(out).values()) == {1}
    before = kept(out)
    (out / "units.jsonl").unlink()
    again = on_ray(plan, out)
    again.communicate(timeout=1200)
    assert again.returncode == 0
    assert kept(out) == before


def test_a_driver_that_is_killed_goes_on_where_it_stopped(plan: Path, alone: dict[str, Any]) -> None:
    out = plan.parent / "driver"
    running = on_ray(plan, out)
    while not (out / "units.jsonl").exists() or len(done(out)) < 20:
        assert running.poll() is None
        time.sleep(0.5)
    running.kill()
    running.communicate()
    before = done(out)
    again = on_ray(plan, out)
    said, _ = again.communicate(timeout=1200)
    assert again.returncode == 0, said
    assert "units were done before" in said
    assert records(out) == alone
    # Only records are written anew.
    assert {name for name, count in done(out).items() if count > 1} <= {n for n in before if n.endswith("/record")}


@pytest.mark.parametrize(
    ("command", "made"),
    [
        (["attribute", "--split", "all"], ["out.parquet", "out.json"]),
        (["record", "--layers", "0-1"], ["out/store.json", "out/shards/00000/activations.safetensors"]),
    ],
    ids=["attribute", "record"],
)
def test_what_is_attributed_and_recorded_in_parts_is_the_same(
    plan: Path, command: list[str], made: list[str], tmp_path: Path
) -> None:
    asked = [*command, "--model", plan.parent / "llama", "--data", plan.parent / "capitals.jsonl"]
    for name, cluster in (("one", []), ("ray", ["--ray", "local", "--workers", "2"])):
        out = tmp_path / name / ("out.parquet" if command[0] == "attribute" else "out")
        run = [PYTHON, "-m", "conflictscope", *asked, "--out", out, *cluster]
        subprocess.run(run, env=ONE_THREAD, check=True, capture_output=True, timeout=600)
    for file in made:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "ray" / file).read_bytes()


def test_a_cluster_that_is_not_there_is_said(plan: Path, tmp_path: Path) -> None:
    command = [PYTHON, "-m", "conflictscope", "compare", plan, "--out", tmp_path, "--ray", "127.0.0.1:1"]
    result = subprocess.run(command, env=ONE_THREAD, text=True, capture_output=True, timeout=300, check=False)
    assert result.returncode == 2
    assert "There is no Ray cluster at 127.0.0.1:1" in " ".join(result.stderr.split())
