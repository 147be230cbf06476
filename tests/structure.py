"""How the code is built, in figures: `python tests/structure.py` prints them, `test_structure.py` holds their limits.

- *modules*: Python files of a package, `__init__` files counted.
- *longest import chain*: modules on the longest path of imports that importing carries out. An import from a package's
  public surface counts as one of the module that defines the name. The chain of `executors` goes on into
  `hybridsd_sim`; its limit is on the executors' own modules. Circles are looked for among all imports, those
  inside functions and for type checkers too.
- *used once*: private functions that a single place of their module uses, as a share of all functions.
- *class names in two modules*: over both packages.
- *past the door*: imports from inside another package, where its public surface (`__init__`) is the way in.
- *modules that a cold price crosses*: those with a function that runs when one plan is priced with fresh profiles.
"""

from __future__ import annotations

import ast
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path
from statistics import median
from types import FrameType

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("hybridsd_sim", "executors")


def sources(package: str) -> dict[str, Path]:
    """The modules of a package by name."""
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def tree(path: Path) -> ast.Module:
    """A module's syntax tree."""
    return ast.parse(path.read_text(encoding="utf-8"))


def everything() -> dict[str, Path]:
    """The modules of both packages."""
    return {name: path for package in PACKAGES for name, path in sources(package).items()}


def imported(module: str, path: Path, *, inner: bool) -> Iterator[tuple[str, str]]:
    """What a module imports by `from source import name`, as absolute (source, name); `inner` imports too."""
    for node in ast.walk(tree(path)) if inner else tree(path).body:
        if isinstance(node, ast.ImportFrom):
            here = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
            base = here[: len(here) - node.level + 1] if node.level else []
            source = ".".join([*base, *(node.module.split(".") if node.module else [])])
            yield from ((source, alias.name) for alias in node.names)


def imports(module: str, known: dict[str, Path], *, inner: bool) -> Iterator[str]:
    """The modules of ours that one imports from, public surfaces seen through; `inner` ones too."""
    for source, name in imported(module, known[module], inner=inner):
        yield from defining(source, name, known)


def past_the_door() -> list[str]:
    """Imports from inside another package of ours, as `module: from source import name`; those in functions too."""
    known = everything()
    surfaces = {name for name, path in known.items() if path.name == "__init__.py" and name not in PACKAGES}
    found = []
    for module, path in known.items():
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Import):
                found += [f"{module}: import {each.name}" for each in node.names if each.name.split(".")[0] in PACKAGES]
        for source, name in imported(module, path, inner=True):
            # a module may be the source of names, or itself the name
            reached = f"{source}.{name}" if f"{source}.{name}" in known else source
            package = reached.rpartition(".")[0]
            if package in surfaces and not f"{module}.".startswith(f"{package}."):
                found.append(f"{module}: from {source} import {name}")
    return found


def defining(source: str, name: str, known: dict[str, Path]) -> Iterator[str]:
    """The module that `from source import name` reaches."""
    if f"{source}.{name}" in known:
        yield f"{source}.{name}"
    elif source in known and (stub := known[source].with_suffix(".pyi")).exists():
        for node in tree(stub).body:
            if isinstance(node, ast.ImportFrom) and any(alias.name == name for alias in node.names):
                yield from defining(f"{source}.{node.module}", name, known)
    elif source in known:
        yield source


def order(*, inner: bool) -> Iterator[tuple[str, list[str]]]:
    """Every module with those that it imports from, lowest first. Raises `CycleError` for a circle."""
    known = everything()
    below = {module: sorted(set(imports(module, known, inner=inner)) - {module}) for module in known}
    return ((module, below[module]) for module in TopologicalSorter(below).static_order())


def longest_chain(package: str) -> list[str]:
    """The longest path of imports that starts in a package, highest module first."""
    chains: dict[str, list[str]] = {}
    for module, below in order(inner=False):
        chains[module] = [module, *max((chains[other] for other in below), key=len, default=[])]
    return max((chain for module, chain in chains.items() if module.startswith(package)), key=len)


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """All functions and methods of a module."""
    return (node for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def used_once() -> tuple[list[str], int]:
    """Private functions that one place of their module uses, as `module:name`, and how many functions there are."""
    once, total = [], 0
    for module, path in everything().items():
        names = Counter(function.name for function in functions(path))
        nodes = list(ast.walk(tree(path)))
        uses = Counter(node.id for node in nodes if isinstance(node, ast.Name))
        uses += Counter(node.attr for node in nodes if isinstance(node, ast.Attribute))
        private = (name for name in names if name.startswith("_") and not name.startswith("__"))
        once += [f"{module}:{name}" for name in private if names[name] == uses[name] == 1]
        total += names.total()
    return once, total


def twice_named() -> dict[str, list[str]]:
    """Class names that stand in more than one module."""
    found = defaultdict(list)
    for module, path in everything().items():
        for node in tree(path).body:
            if isinstance(node, ast.ClassDef):
                found[node.name].append(module)
    return {name: modules for name, modules in found.items() if len(modules) > 1}


def one_line_docstrings() -> float:
    """The share of public functions with a docstring whose docstring is one line."""
    public = (each for path in everything().values() for each in functions(path) if not each.name.startswith("_"))
    texts = [text for each in public if (text := ast.get_docstring(each))]
    return sum("\n" not in text for text in texts) / len(texts)


def crossed_by_a_price() -> list[str]:
    """The modules of which a function runs when one hybrid plan is priced, nothing having been worked out before."""
    from hybridsd_sim import load_profiles, load_scenario, price
    from hybridsd_sim.pricing import find_candidates

    scenario = load_scenario("quickstart")
    priced = find_candidates(scenario, load_profiles()).by_class["picture"]
    cost = next(option.cost for option in priced if len(option.plan.stages) == 2)
    fresh, crossed = load_profiles(), set()

    def enter(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and (module := frame.f_globals.get("__name__", "")).startswith("hybridsd_sim."):
            crossed.add(module)

    sys.setprofile(enter)
    try:
        price(cost.plan, cost.request, fresh)
    finally:
        sys.setprofile(None)
    return sorted(crossed)


def main() -> None:
    """Print every figure."""
    for package in PACKAGES:
        known = sources(package)
        lines = [
            len(path.read_text(encoding="utf-8").splitlines()) for path in known.values() if path.stem != "__init__"
        ]
        chain = longest_chain(package)
        print(f"{package}: {len(known)} modules, median {median(lines):.0f} lines, longest {max(lines)}")
        print(f"  longest import chain: {len(chain)}: {' > '.join(chain)}")
    once, total = used_once()
    print(f"private functions used once: {len(once)} of {total} functions, {len(once) / total:.1%}")
    twice = twice_named()
    print(f"imports past a package's door: {len(past_the_door())}")
    print(f"class names in two modules: {len(twice)}: {', '.join(sorted(twice))}")
    print(f"public docstrings of one line: {one_line_docstrings():.0%}")
    crossed = crossed_by_a_price()
    print(f"modules that a cold price crosses: {len(crossed)}: {', '.join(crossed)}")


if __name__ == "__main__":
    main()
