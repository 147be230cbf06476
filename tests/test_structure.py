"""The structure stays readable: few modules, short chains of imports, names that mean one thing (`structure.py`)."""

from __future__ import annotations

import pytest

import structure


@pytest.mark.parametrize(("package", "most"), [("hybridsd_sim", 90), ("executors", 50)])
def test_a_package_has_few_modules(package: str, most: int) -> None:
    """A stranger finds the place of a change from the folder listing; surfaces (`__init__`) hold no code."""
    assert len([name for name, path in structure.sources(package).items() if path.stem != "__init__"]) <= most


@pytest.mark.parametrize("package", structure.PACKAGES)
def test_chains_of_imports_are_short(package: str) -> None:
    """At most sixteen modules of a package in a row; below the executors' own come those of `hybridsd_sim`."""
    chain = structure.longest_chain(package)
    assert len([module for module in chain if module.startswith(package)]) <= 16, " > ".join(chain)


def test_no_imports_go_in_a_circle() -> None:
    """Not even those inside functions or for type checkers."""
    assert list(structure.order(inner=True))


def test_packages_are_entered_by_their_doors() -> None:
    """One way in to every name: other packages import from a package's public surface."""
    assert structure.past_the_door() == []


def test_few_private_functions_are_used_once() -> None:
    """A function of its own explains something by its name; the rest stand where they are used."""
    once, total = structure.used_once()
    assert len(once) < 0.15 * total


def test_a_class_name_means_one_thing() -> None:
    """Hardly a class name stands in two modules."""
    assert len(structure.twice_named()) < 8


def test_a_price_crosses_few_modules() -> None:
    """Who follows one price from nothing opens at most twelve modules."""
    crossed = structure.crossed_by_a_price()
    assert len(crossed) <= 12, crossed
