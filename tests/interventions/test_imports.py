import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    "module",
    [
        "interventions.bake",
        "interventions.base",
        "interventions",
        "interventions.config",
        "interventions.entries",
        "interventions.features",
        "interventions.dial",
        "interventions.gate",
        "interventions.heads",
        "interventions.identity",
        "interventions.runtime",
        "interventions.steering",
    ],
)
def test_serving_needs_neither_transformer_lens_nor_sae_lens(module):
    code = (
        "import sys\n"
        "for name in ('transformer_lens', 'sae_lens', 'polars', 'plotly'): sys.modules[name] = None\n"
        f"import {module}"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
