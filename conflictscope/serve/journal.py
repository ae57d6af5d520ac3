"""Answers on the disk before they are sent."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from pathlib import Path

from conflictscope.serve.jobs import Done, Job


class Journal:
    """Answers in a file, one JSON object a line, on the disk before they are sent.

    Args:
        path: The file; what it holds already is kept.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._stream = path.open("a+b")
        self._stream.seek(0, os.SEEK_END)
        if end := self._stream.tell():
            self._stream.seek(end - 1)
            if self._stream.read(1) != b"\n":
                # A line that was being written when the server was killed; nobody got that answer.
                self._stream.write(b"\n")

    def append(self, answers: Iterable[tuple[Job, Done]]) -> None:
        """Write answers that ended together, and wait until they are on the disk."""
        for job, done in answers:
            record = {
                "id": job.id,
                "index": job.index,
                "time": time.time(),
                "intervention": job.intervention,
                "request": job.asked.model_dump(exclude_unset=True),
                "answer": done.text,
            }
            self._stream.write(json.dumps(record, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def close(self) -> None:
        """Close the file."""
        self._stream.close()
