"""The report of one study or several: a single HTML page of their figures, numbers, answers and method."""

from conflictscope.report.page import write_report
from conflictscope.report.runs import Run, read_runs

__all__ = ["Run", "read_runs", "write_report"]
