"""Layers on two devices: tensors that meet are on one."""

from __future__ import annotations

import subprocess
import sys


def test_models_on_two_devices_are_taken_apart():
    found = subprocess.run([sys.executable, "-m", "tests.sharded"], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr[-2000:]
