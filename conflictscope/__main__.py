"""``python -m conflictscope`` is the command line."""

from conflictscope.cli import main

main()
