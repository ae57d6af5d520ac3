"""Deliberate faults that the tests must notice.

    python -m tests.faults                 # all of them, some minutes
    python -m tests.faults sign mask       # those that are called so

Each fault is one piece of text in place of another. The tests named with it pass on a copy of the tree as it is; with
the fault in the copy one of them must fail, and the first that does is shown.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import typer
from rich.console import Console

ROOT = Path(__file__).parents[1]
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "out", "shared", "__pycache__")


class Fault(NamedTuple):
    """A fault: its name, the text of a file that another takes the place of, and the tests that should notice it."""

    name: str
    file: str
    before: str
    after: str
    tests: str


FAULTS = (
    Fault(
        "sign of a score",
        "interp/attribution/attribution_patching.py",
        "-(gradient.float() * change",
        "(gradient.float() * change",
        "tests/interp/attribution/test_attribution_patching.py",
    ),
    Fault(
        "patched and clean exchanged",
        "interp/attribution/path_patching.py",
        "difference[:, :1] - difference[:, 1:]",
        "difference[:, 1:] - difference[:, :1]",
        "tests/interp/attribution/test_path_patching.py",
    ),
    Fault(
        "position one before the last",
        "interp/attribution/states.py",
        "inputs[0][:, -1].to(rows.device)",
        "inputs[0][:, -2].to(rows.device)",
        "tests/interp/attribution/test_path_patching.py",
    ),
    Fault(
        "answer read one token late",
        "interp/teacher_forcing.py",
        "width - 1 - item.predicted : width - 1",
        "width - item.predicted : width",
        "tests/interp/test_teacher_forcing.py",
    ),
    Fault(
        "mask of padding dropped",
        "interp/inputs.py",
        '"attention_mask": mask,',
        '"attention_mask": torch.ones_like(mask),',
        "tests/interp/test_teacher_forcing.py",
    ),
    Fault(
        "positions counted from the padding",
        "interp/inputs.py",
        "(mask.cumsum(-1) - 1).clamp(min=0)",
        "torch.arange(width, device=device).expand_as(mask)",
        "tests/interp/test_teacher_forcing.py",
    ),
    Fault(
        "order of heads and their numbers exchanged",
        "interventions/heads.py",
        "Placed(factor.flatten())",
        "Placed(factor.T.flatten())",
        "tests/interventions/test_heads.py",
    ),
    Fault(
        "order of heads in the output matrix",
        "interp/anatomy.py",
        ".reshape(self.n_heads, self.d_head, self.d_model)",
        ".reshape(self.d_head, self.n_heads, self.d_model).transpose(0, 1)",
        "tests/interp/test_anatomy.py",
    ),
    Fault(
        "bias of the attention output missing",
        "interp/anatomy.py",
        "return mapped(projection, z.flatten(-2)",
        "return linear_part(projection, z.flatten(-2)",
        "tests/interp/test_anatomy.py",
    ),
    Fault(
        "norm after the MLP left out",
        "interp/anatomy.py",
        "output if path is None else self._block_part(layer, path)(output)",
        "output",
        "tests/interp/test_anatomy.py",
    ),
    Fault(
        "parallel block taken for a sequential one",
        "interp/anatomy.py",
        "residual if self.parallel else after_attention",
        "after_attention",
        "tests/interp/test_anatomy.py",
    ),
    Fault(
        "scale folded in twice",
        "interventions/bake.py",
        "weight.copy_(change.scale * values)",
        "weight.copy_(change.scale**2 * values)",
        "tests/interventions/test_bake.py",
    ),
    Fault(
        "shift of the bias forgotten",
        "interventions/bake.py",
        "bias.float() + change.shift.to(values.device) @ values",
        "bias.float()",
        "tests/interventions/test_bake.py",
    ),
    Fault(
        "first generated token taken for the prompt's",
        "interventions/tokens.py",
        "generated = (columns >= state.length)",
        "generated = (columns > state.length)",
        "tests/interventions/test_tokens.py",
    ),
    Fault(
        "cache of another prompt gone on with",
        "interventions/tokens.py",
        "new == 1 and before == seen and (state.cache is None or state.cache() is cache)",
        "True",
        "tests/interventions/test_tokens.py",
    ),
    Fault(
        "cache written to and not restored",
        "interp/reading.py",
        "return copy.deepcopy(batch.cache)",
        "return batch.cache",
        "tests/interp/test_reading.py",
    ),
    Fault(
        "a shared beginning stays before the padding",
        "interp/reading.py",
        "kept.gather(2, order.to(kept.device).expand_as(kept))",
        "kept",
        "tests/interp/test_reading.py",
    ),
    Fault(
        "last tokens begin a layer too high",
        "interp/reading.py",
        "start = lowest if self._given_at_end[batch] else 0",
        "start = lowest + 1 if self._given_at_end[batch] else 0",
        "tests/interp/test_reading.py",
    ),
    Fault(
        "rows of another prompt side by side",
        "interp/reading.py",
        "_repeated(given[layer - 1], times) if layer",
        "given[layer - 1].repeat(times, 1, 1) if layer",
        "tests/interp/attribution/test_head_gains.py",
    ),
    Fault(
        "pairs of prompts in another order",
        "interp/reading.py",
        "[without[i] for i in batch.numbers]",
        "[*without][: len(batch.numbers)]",
        "tests/interp/test_reading.py",
    ),
    Fault(
        "the lowest rate within the budget",
        "conflictscope/study/choice.py",
        "key=lambda number: -self._rate(self.left[number])",
        "key=lambda number: self._rate(self.left[number])",
        "tests/conflictscope/study/test_choice.py",
    ),
    Fault(
        "gate reads the first token",
        "interventions/gate.py",
        "mask.int().argmax(-1)",
        "mask.int().argmin(-1)",
        "tests/interventions/test_gate.py",
    ),
    Fault(
        "features added that fire enough",
        "interventions/features.py",
        "(target - z).clamp(min=0)",
        "target - z",
        "tests/interventions/test_features.py",
    ),
    Fault(
        "direction swapped",
        "conflictscope/methods/_steering.py",
        'if towards == "context" else',
        'if towards == "memory" else',
        "tests/conflictscope/methods/test_steering.py",
    ),
    Fault(
        "control drawn from the chosen heads too",
        "conflictscope/methods/_heads.py",
        "if place not in taken]",
        "if place is not taken]",
        "tests/conflictscope/methods/test_heads.py",
    ),
    Fault(
        "split by prompt and not by subject",
        "interp/facts.py",
        "split=split_of(fact.subject, seed)",
        "split=split_of(bare, seed)",
        "tests/interp/test_facts.py",
    ),
    Fault(
        "interval of prompts and not of subjects",
        "interp/evaluation.py",
        'return rate(_numbers(self.frame, outcome), self.frame["subject"].to_list())',
        "return rate(_numbers(self.frame, outcome), range(len(self.frame)))",
        "tests/interp/test_evaluation.py",
    ),
    Fault(
        "damage measured on the edited side",
        "interp/evaluation.py",
        "clean.exp() * (clean - changed)",
        "changed.exp() * (changed - clean)",
        "tests/interp/test_evaluation.py",
    ),
    Fault(
        "change measured backwards",
        "interp/evaluation.py",
        "paired_difference(values, _numbers(self.frame, outcome),",
        "paired_difference(_numbers(self.frame, outcome), values,",
        "tests/interp/test_evaluation.py",
    ),
    Fault(
        "threshold of the detector one rank low",
        "probes/detector.py",
        "math.ceil((negatives + 1) * (1 - false_positive_rate))",
        "math.ceil(negatives * (1 - false_positive_rate))",
        "tests/probes/test_detector.py",
    ),
    Fault(
        "shorter answer within a longer one counted",
        "interp/answers.py",
        "memory, context = _outside(memory, context), _outside(context, memory)",
        "memory, context = set(memory), set(context)",
        "tests/interp/test_answers.py",
    ),
)


def run(tree: Path, tests: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run tests in a tree until one fails."""
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "--durations=0", *tests]
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)


def main(
    names: Annotated[list[str] | None, typer.Argument(help="Parts of names; all faults by default.")] = None,
) -> None:
    """See that the tests notice every fault."""
    console = Console(soft_wrap=True, highlight=False, markup=False)
    faults = [fault for fault in FAULTS if not names or any(name in fault.name for name in names)]
    missed = []
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(ROOT, tree, ignore=LEFT_OUT)
        whole = run(tree, list(dict.fromkeys(fault.tests for fault in faults)))
        if whole.returncode:
            console.print(whole.stdout)
            raise typer.Exit(1)
        console.print(f"{len(faults)} faults; without them all tests pass.")
        for fault in faults:
            path = tree / fault.file
            right = path.read_text(encoding="utf-8")
            path.write_text(with_fault(right, fault), encoding="utf-8")
            found = run(tree, [fault.tests])
            path.write_text(right, encoding="utf-8")
            caught = re.search(r"^FAILED (\S+)", found.stdout, re.MULTILINE)
            # Another exit code than 1 says that the tests did not run.
            if found.returncode == 1 and caught:
                console.print(f"{fault.name} ({fault.file}):\n    {caught[1]}")
            else:
                missed.append(fault.name)
                console.print(f"{fault.name} ({fault.file}):\n    NOT CAUGHT by {fault.tests}\n{found.stdout}")
    console.print(f"{len(faults) - len(missed)} of {len(faults)} faults were caught.")
    raise typer.Exit(bool(missed))


def with_fault(text: str, fault: Fault) -> str:
    """A file's text with the fault; what it takes the place of must occur once."""
    if (count := text.count(fault.before)) != 1:
        raise ValueError(f"{fault.before!r} occurs {count} times in {fault.file}; name the fault's text anew.")
    return text.replace(fault.before, fault.after)


if __name__ == "__main__":
    typer.run(main)
