"""Plans, prices and simulates Stable Diffusion inference shared between edge devices and cloud GPUs.

The names below are the public surface; each is loaded from its room when first asked for, so that importing the package
costs nothing. `simulate` and `optimize` are the functions, here and always; the rooms of the same names are reached
with `from hybridsd_sim.simulate import ...`.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from hybridsd_sim.version import __version__

if TYPE_CHECKING:
    from hybridsd_sim.capacity import CapacityPlan as CapacityPlan
    from hybridsd_sim.cost import PlanCost as PlanCost
    from hybridsd_sim.cost import price as price
    from hybridsd_sim.errors import HybridSDError as HybridSDError
    from hybridsd_sim.errors import InputError as InputError
    from hybridsd_sim.optimize import optimize as optimize
    from hybridsd_sim.plan import Plan as Plan
    from hybridsd_sim.plan import Request as Request
    from hybridsd_sim.plan import Site as Site
    from hybridsd_sim.plan import Stage as Stage
    from hybridsd_sim.profiles import Profiles as Profiles
    from hybridsd_sim.profiles import load_profiles as load_profiles
    from hybridsd_sim.report import write_report as write_report
    from hybridsd_sim.scenario import Scenario as Scenario
    from hybridsd_sim.scenario import load_scenario as load_scenario
    from hybridsd_sim.scheduler import Scheduler as Scheduler
    from hybridsd_sim.simulate import SimResult as SimResult
    from hybridsd_sim.simulate import simulate as simulate

_ROOMS = {
    "CapacityPlan": "capacity",
    "HybridSDError": "errors",
    "InputError": "errors",
    "Plan": "plan",
    "PlanCost": "cost",
    "Profiles": "profiles",
    "Request": "plan",
    "Scenario": "scenario",
    "Scheduler": "scheduler",
    "SimResult": "simulate",
    "Site": "plan",
    "Stage": "plan",
    "load_profiles": "profiles",
    "load_scenario": "scenario",
    "optimize": "optimize",
    "price": "cost",
    "simulate": "simulate",
    "write_report": "report",
}

__all__ = ["__version__", *_ROOMS]  # noqa: PLE0604 -- the table drives it; every entry is a string


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    value = getattr(import_module(f"{__name__}.{_ROOMS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


class _Package(ModuleType):
    """The package as a module whose public names keep their meaning.

    Importing `hybridsd_sim.simulate` from anywhere would otherwise rebind `hybridsd_sim.simulate` to the room.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _ROOMS and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
