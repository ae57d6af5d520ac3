"""What is worked with at a prompt starts without the libraries that take seconds to import."""

from __future__ import annotations

import subprocess
import sys

SLOW = ("transformer_lens", "sae_lens", "plotly", "pandas", "sklearn", "matplotlib", "datasets")

LOOKS = """
import sys
from pathlib import Path

for name in {slow}:
    sys.modules[name] = None
folder, out = sys.argv[1], Path(sys.argv[2])

from conflictscope.explore.looks import Asked, Edit, Explorer
from interp.attribution.attribution_patching import attribution_patching
from interp.attribution.path_patching import path_patching
from interp.evaluation import measure_usage, neutral_kl
from interp.facts import known_facts, usable_facts
from interp.fingerprints import fingerprint
from interp.models import load_model
from interventions.base import applied
from interventions.config import InterventionFile
from interventions.dial import DialScale, TrustDial
from interventions.identity import ModelIdentity
from tests.tiny import tiny_conflicts

model = load_model(folder, device="cpu")
conflicts = tiny_conflicts()
measure_usage(model, conflicts)
known_facts(model, "capital", among=usable_facts("capital")[:2])
path_patching(model, conflicts, name="tiny")
attribution_patching(model, conflicts, name="tiny")
fingerprint(model)
dial = TrustDial((DialScale(1, 1, 2.0, 0.5),), 0.5, ())
InterventionFile.of([dial], name="dial", model=ModelIdentity.of(model, "tiny")).save(out / "dial.json")
file = InterventionFile.load(out / "dial.json")
neutral_kl(model, lambda: applied(model, *file.build()), texts=["The capital of Peru is Lima."])
explorer = Explorer(model, name="tiny", files={{"dial": file}})
asked = Asked("The capital of Peru is", "The capital of Peru is Oslo.", "Lima", "Oslo")
look = explorer.look(asked, Edit("dial", dose=1.0))
assert look.heads is not None and look.unedited.lens is not None and look.edited is not None
explorer.attention(asked, [(1, 2)])

from conflictscope.cli import main

for command in {commands}:
    sys.argv = ["conflictscope", *command]
    try:
        main()
    except SystemExit as stopped:
        assert not stopped.code, (command, stopped.code)
    print("done:", *command)
"""


def test_questions_attributions_edits_and_looks_at_files_need_none_of_the_slow_libraries(tiny_directories, tmp_path):
    model, data = str(tiny_directories["llama"]), str(tmp_path / "capitals.jsonl")
    question = ["What is the capital of Peru?", "--context", "The capital of Peru is Oslo.", "--context-answer", "Oslo"]
    commands = [
        ["data", "build", "--relation", "capital", "--all-facts", "--out", data],
        ["data", "inspect", data],
        ["ask", *question, "--model", model, "--device", "cpu"],
        ["models"],
    ]
    # All in one process: to import what is needed takes longer than to use it.
    start = [sys.executable, "-c", LOOKS.format(slow=SLOW, commands=commands), model, str(tmp_path)]
    found = subprocess.run(start, check=False, capture_output=True, text=True, cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("done: ") == len(commands)


HELP = """
import sys
from typer.main import get_command
from typer.testing import CliRunner
from conflictscope.cli import app

def commands(group, *path):
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, *path, name)
        else:
            yield (*path, name)

named = [(), *commands(get_command(app))]
for command in named:
    found = CliRunner().invoke(app, [*command, "--help"])
    assert found.exit_code == 0, (command, found.output)
imported = {{name for name in sys.modules if "." not in name}} & {slow}
assert not imported, imported
print(len(named))
"""


def test_no_command_s_help_waits_for_a_library():
    slow = {*SLOW, "torch", "transformers", "polars", "numpy", "fastapi", "dash"}
    found = subprocess.run([sys.executable, "-c", HELP.format(slow=slow)], check=False, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert int(found.stdout) > 25


MISSING = """
import sys
for name in {slow}:
    sys.modules[name] = None
from typer.testing import CliRunner
from conflictscope.cli import app

for command in {commands}:
    found = CliRunner().invoke(app, command.split())
    said = str(found.exception)
    is_said = said.startswith(("There is no none.", "There is no model directory ./"))
    assert is_said and said.endswith("; check the path."), (command, said, found.output)
"""


def test_a_file_or_model_that_is_not_there_is_said_before_a_library_is_waited_for(tmp_path):
    slow = {*SLOW, "torch", "transformers", "polars", "numpy", "fastapi", "dash"}
    commands = (
        "ask Who? --context It --model ./none",
        "compare none.yaml",
        "compare --test-data none.jsonl",
        "data build --from none.csv",
        "data convert none.csv --format nq_swap",
        "data inspect none.jsonl",
        "dial apply none.json",
        "evaluate --config none.json",
        "evaluate --data none.jsonl",
        "export smollm2-135m none.json out.json",
        "explore ./none",
        "gate fit none.json",
        "generate smollm2-135m Hello --config none.json",
        "import none.gguf",
        "inspect none.json",
        "serve none.json",
        "tune smollm2-135m none.csv --towards context",
    )
    start = [sys.executable, "-c", MISSING.format(slow=slow, commands=commands)]
    found = subprocess.run(start, check=False, capture_output=True, text=True, cwd=tmp_path)
    assert found.returncode == 0, found.stderr
