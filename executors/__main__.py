"""`python -m executors`, from a checkout, has the commands that `hybridsd-sim` has when the extra is installed."""

from __future__ import annotations

from .cli import main

if __name__ == "__main__":
    main()
