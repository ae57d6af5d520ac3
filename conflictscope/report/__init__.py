"""The report of one study or several: a single HTML page of their figures, numbers, answers and method."""

from conflictscope.report.page import write_report
from conflictscope.report.runs import Run, demo_run, read_runs

__all__ = ["Run", "demo_run", "read_runs", "write_report"]
