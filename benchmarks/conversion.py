"""What converting a public data set costs, in time and memory, against the plain way in the same run.

Run ``python -m benchmarks.conversion --json``. The rows are synthetic, in the format of NQ-Swap, three examples a row.

    conversion    ``convert_dataset``, from JSON lines, a JSON array, CSV and Parquet
    plain         all rows of the JSON lines in memory, then all examples; ``dataclasses.asdict`` and ``json.dumps``

Every side has a process of its own, which reports its seconds without the imports, and the most memory that it ever
held with them. The two files written from JSON lines must hold the same examples.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from interp.conflicts import ConflictExample, ContextKind, split_of
from interp.formats import convert_dataset

SEED = 0
ENDINGS = ("jsonl", "json", "csv", "parquet")


def synthetic_rows(count: int) -> list[dict[str, Any]]:
    """Rows of NQ-Swap with contexts of some 90 words."""
    rng = random.Random(SEED)
    words = ["".join(rng.choices("abcdefghijklmnoprstuvw", k=rng.randint(3, 9))) for _ in range(5000)]

    def text(length: int) -> str:
        return " ".join(rng.choices(words, k=length))

    rows: list[dict[str, Any]] = []
    for number in range(count):
        before, after, memory, other = text(60), text(20), f"{text(2)} m", f"{text(2)} c"
        rows.append(
            {
                "question": f"who {text(6)} {number}",
                "org_context": f"{before} {memory} {after}.",
                "sub_context": f"{before} {other} {after}.",
                "org_answer": [memory, f"{text(1)} n"],
                "sub_answer": [other],
            }
        )
    return rows


def write_files(folder: Path, count: int) -> None:
    """The same rows under each ending."""
    import polars as pl

    rows = synthetic_rows(count)
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with (folder / "rows.csv").open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        for row in rows:
            writer.writerow(
                {name: value if isinstance(value, str) else json.dumps(value) for name, value in row.items()}
            )
    pl.DataFrame(rows).write_parquet(folder / "rows.parquet")


def convert_plainly(path: Path, out: Path) -> None:
    """What a script of a few lines would do."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    examples: list[ConflictExample] = []
    for number, row in enumerate(rows, 1):
        ask = f"Question: {row['question']}\nAnswer:"
        memory = tuple(row["org_answer"])
        contexts: list[tuple[ContextKind, str, tuple[str, ...]]] = [
            ("conflict", row["sub_context"], tuple(row["sub_answer"])),
            ("aligned", row["org_context"], memory),
            ("none", "", ()),
        ]
        for kind, context, answers in contexts:
            examples.append(
                ConflictExample(
                    id=f"nq-swap-{number}-{kind}",
                    subject=row["question"],
                    relation="nq-swap",
                    question=row["question"],
                    contexts=(context,) if context else (),
                    memory_answers=memory,
                    context_answers=answers,
                    kind=kind,
                    template="nq-swap",
                    source="nq-swap",
                    prompt=f"{context}\n\n{ask}" if context else ask,
                    bare_prompt=ask,
                    split=split_of(row["question"], SEED),
                )
            )
    lines = [json.dumps(dataclasses.asdict(example), ensure_ascii=False) + "\n" for example in examples]
    out.write_text("".join(lines), encoding="utf-8")


def side(name: str, folder: Path, count: int) -> dict[str, float]:
    """Do one side's work in this process."""
    begin = time.perf_counter()
    if name == "files":
        write_files(folder, count)
    elif name == "plain":
        convert_plainly(folder / "rows.jsonl", folder / "plain.jsonl")
    else:
        convert_dataset(folder / f"rows.{name}", "nq-swap", folder / f"from_{name}.jsonl")
    seconds = time.perf_counter() - begin
    return {"seconds": round(seconds, 2), "mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}


def main(
    rows: Annotated[int, typer.Option(help="Rows to convert.")] = 100_000,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON line last.")] = False,
    only: Annotated[str | None, typer.Option(hidden=True)] = None,
    folder: Annotated[Path, typer.Option(hidden=True)] = Path(),
) -> None:
    """Write the rows, convert them from every kind of file and plainly, compare."""
    if only is not None:
        sys.stdout.write(json.dumps(side(only, folder, rows)) + "\n")
        return

    with tempfile.TemporaryDirectory() as temporary:

        def alone(name: str) -> dict[str, float]:
            command = [sys.executable, "-m", "benchmarks.conversion", "--only", name, "--folder", temporary]
            done = subprocess.run([*command, "--rows", str(rows)], check=True, capture_output=True, text=True)
            return json.loads(done.stdout.splitlines()[-1])

        alone("files")
        # Ours runs before and after the plain way, so that whatever else the machine does hits both.
        first, plain, *found = (alone(name) for name in (ENDINGS[0], "plain", *ENDINGS))
        with Path(temporary, "plain.jsonl").open() as theirs, Path(temporary, "from_jsonl.jsonl").open() as ours:
            same = all(json.loads(a) == json.loads(b) for a, b in zip(theirs, ours, strict=True))
    seconds = (first["seconds"] + found[0]["seconds"]) / 2
    result: dict[str, Any] = {
        "ratio": round(plain["seconds"] / seconds, 1),
        "rows": rows,
        "same_examples": same,
        "plain_seconds": plain["seconds"],
        "plain_mb": plain["mb"],
    }
    for ending, cost in zip(ENDINGS, found, strict=True):
        result |= {f"{ending}_seconds": cost["seconds"], f"{ending}_mb": cost["mb"]}
    if not as_json:
        print(f"Plain: {plain['seconds']:6.1f} s, {plain['mb']:5.0f} MB for {rows} rows of JSON lines")
        for ending, cost in zip(ENDINGS, found, strict=True):
            print(f"Ours:  {cost['seconds']:6.1f} s, {cost['mb']:5.0f} MB from {ending}")
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    typer.run(main)
