"""``python -m conflictscope.cli`` is the command line."""

from conflictscope.cli import main

if __name__ == "__main__":
    main()
