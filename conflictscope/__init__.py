"""The application: command line, studies, report. It composes; it computes nothing itself."""

__version__ = "0.1.0"
