"""`python -m hybridsd_sim` is the command `hybridsd-sim`."""

from __future__ import annotations

from hybridsd_sim.cli import main

if __name__ == "__main__":
    main()
