"""Studies of a tiny model by command: it is taken to know all that it is asked, and little is read and timed."""

from __future__ import annotations

import pytest

from interp.evaluation import neutral_texts


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the studies small; what they cost is measured in the tests of the engine."""
    few = neutral_texts()[:4]
    for module in ("interp.evaluation", "conflictscope.study.measure"):
        monkeypatch.setattr(f"{module}.neutral_texts", lambda: few)
    monkeypatch.setattr("interp.known.known_facts", lambda *_, among, **__: among)
    monkeypatch.setattr("conflictscope.study.measure._cost", lambda *_: {"speed": 1.0, "low": 1.0, "high": 1.0})
    # Random models never end an answer.
    monkeypatch.setattr("conflictscope.study.setting.room_for_answers", lambda *_: 4)
    monkeypatch.setattr("conflictscope.study.lab._TEXTS", {"train": 6, "dev": 4})
    monkeypatch.setattr("conflictscope.study.lab._TEXT_TOKENS", 8)
    monkeypatch.setattr("conflictscope.methods.dial.SETTINGS", (-1.0, 0.0, 1.0))
