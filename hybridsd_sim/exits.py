"""How a command line ends: errors as messages on standard error, and exit codes.

Exit 0 is fine, 1 means that the run failed, 2 that the input is wrong. `--debug`, anywhere in the line, shows
tracebacks.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from hybridsd_sim.errors import HybridSDError, InputError


def run_to_exit(app: Callable[..., Any]) -> None:
    """Run a typer app on this process's arguments; turn errors into messages and exit codes."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    try:
        app(args=arguments)
    except InputError as error:
        _stop(2, error.problems, debug=debug)
    except HybridSDError as error:
        _stop(1, [error], debug=debug)
    except Exception as error:  # noqa: BLE001 -- whatever else happens, people get a message and scripts an exit code
        _stop(1, [f"{type(error).__name__}: {error}. Add --debug to see where."], debug=debug)


def _stop(code: int, messages: Sequence[object], *, debug: bool) -> NoReturn:
    if debug:
        traceback.print_exc()
    sys.stderr.writelines(f"error: {message}\n" for message in messages)
    raise SystemExit(code)
