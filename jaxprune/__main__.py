"""Runs the command-line interface: ``python -m jaxprune``."""

import sys

from jaxprune._files.command_line import main

if __name__ == "__main__":
    # A terminal without Unicode gets escapes, not an error.
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    sys.exit(main())
