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
from interp.models import fingerprint, load_model
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
"""


def test_questions_attributions_and_edits_need_none_of_the_slow_libraries(tiny_directories, tmp_path):
    command = [sys.executable, "-c", LOOKS.format(slow=SLOW), str(tiny_directories["llama"]), str(tmp_path)]
    found = subprocess.run(command, check=False, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
