"""What is installed: the public surface, what importing it loads, the metadata, the pins and the wheel."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import hybridsd_sim

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
HEAVY = {"torch", "diffusers", "pandas", "matplotlib", "ray", "scipy", "pyarrow", "fastapi"}


def run(*command, cwd=ROOT, env=None):
    """Standard output of a command that must succeed."""
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


def python(code, **where):
    """Standard output of Python code in a process of its own, warnings being errors."""
    return run(sys.executable, "-W", "error", "-c", code, **where)


def test_the_public_surface_is_what_all_says():
    """`dir()` and `__all__` name the same things, at most twenty."""
    assert dir(hybridsd_sim) == sorted(hybridsd_sim.__all__)
    assert len(hybridsd_sim.__all__) == len(set(hybridsd_sim.__all__)) <= 20


@pytest.mark.parametrize("name", hybridsd_sim.__all__)
def test_every_public_name_leads_somewhere(name):
    """Each public name can be imported, and says what it is."""
    value = getattr(hybridsd_sim, name)
    assert value.__doc__


def test_an_unknown_name_is_an_attribute_error():
    """Asking the package for something it does not have fails as with any module."""
    with pytest.raises(AttributeError, match="No hybridsd_sim attribute simulator"):
        hybridsd_sim.simulator  # noqa: B018 -- the access is the test


def test_importing_the_package_loads_nothing_heavy():
    """`import hybridsd_sim` loads neither torch, pandas, matplotlib, ray nor any other large library."""
    loaded = set(python("import sys, hybridsd_sim; print(*sys.modules)").split())
    assert not loaded & HEAVY


def test_listing_the_surface_loads_no_package():
    """Importing the package and completing its names in an editor reads none of its packages."""
    loaded = python("import sys, hybridsd_sim; dir(hybridsd_sim); print(*sys.modules)").split()
    assert [name for name in loaded if name.startswith("hybridsd_sim")] == ["hybridsd_sim"]


def test_the_command_is_installed():
    """The distribution installs the command `hybridsd-sim`, and its version is the package's."""
    installed = distribution("hybridsd-sim")
    assert installed.version == hybridsd_sim.__version__
    (command,) = installed.entry_points
    assert (command.group, command.name, command.value) == ("console_scripts", "hybridsd-sim", "hybridsd_sim.cli:main")


def test_the_package_runs_as_a_module():
    """`python -m hybridsd_sim` is the same command."""
    assert "plan" in run(sys.executable, "-m", "hybridsd_sim", "--help")


def test_the_base_needs_no_extra():
    """Installing without extras brings neither torch nor ray nor a web server."""
    base = {Requirement(text).name for text in PROJECT["dependencies"]}
    extras = {Requirement(text).name for texts in PROJECT["optional-dependencies"].values() for text in texts}
    assert not base & extras


def test_every_requirement_is_pinned_inside_its_range():
    """constraints.txt holds exactly one version of everything that any extra asks for, and the range admits it."""
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    pins = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    assert len(pins) == len(lines)
    extras = [text for texts in PROJECT["optional-dependencies"].values() for text in texts]
    for requirement in map(Requirement, [*PROJECT["dependencies"], *extras]):
        if requirement.name != PROJECT["name"]:  # an extra may be made of others
            assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """The folder with a source distribution and the wheel that was built from it, not from the checkout."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "hatchling", "build", "--target", "sdist", "--directory", str(folder))
    (sdist,) = folder.glob("*.tar.gz")
    pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(folder), str(sdist))
    return folder


def pip(*arguments):
    """Run pip without asking anything of a network."""
    run(sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments)


def shipped(folder):
    """Every file of a folder of the checkout, compiled ones apart, relative to the checkout."""
    files = {str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob("*") if path.is_file()}
    return {name for name in files if "__pycache__" not in name}


def test_the_wheel_holds_the_packages_and_their_data(built):
    """The wheel has every module, profile and scenario and the licence; no tests, and one top-level package."""
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {f"hybridsd_sim/_data/{name}" for name in shipped("profiles") | shipped("scenarios")} <= names
    assert shipped("hybridsd_sim") | {f"hybridsd_sim/{name}" for name in shipped("executors")} <= names
    assert f"hybridsd_sim-{hybridsd_sim.__version__}.dist-info/licenses/LICENSE" in names
    tops = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {"hybridsd_sim"}  # another distribution has a package `executors`


def test_the_source_distribution_is_complete(built):
    """The source distribution has what a checkout needs to be tested: sources, data, tests, pins and the Makefile."""
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames()}
    wanted = {"pyproject.toml", "constraints.txt", "Makefile", "README.md", "CHANGELOG.md", "LICENSE", ".ci/run"}
    assert wanted | shipped("profiles") | shipped("scenarios") <= names
    assert "tests/test_packaging.py" in names


@pytest.fixture(scope="session")
def installed(built, tmp_path_factory):
    """The folder that the wheel was installed into; its libraries are those of this environment."""
    (wheel,) = built.glob("*.whl")
    target = tmp_path_factory.mktemp("installed")
    pip("install", "--no-deps", "--no-index", "--target", str(target), str(wheel))
    return target


def test_the_wheel_works_outside_the_checkout(installed, tmp_path):
    """Installed somewhere else and run from another folder, the package finds its profiles and scenarios."""
    code = f"""
import sys
sys.path.insert(0, {str(installed)!r})
import hybridsd_sim
from hybridsd_sim.files import data_folder
scenarios = sorted(data_folder("scenarios").glob("*.yaml"))
print(hybridsd_sim.__file__, scenarios[0], len(hybridsd_sim.load_profiles().gpus), sep="\\n")
print(*(hybridsd_sim.load_scenario(path).name for path in scenarios), sep="\\n")
"""
    package, scenario, gpus, *names = python(code, cwd=tmp_path).splitlines()
    assert Path(package).is_relative_to(installed)
    assert Path(scenario).is_relative_to(installed)
    assert int(gpus) == len(hybridsd_sim.load_profiles().gpus) > 0
    assert "quickstart" in names


# ---- The executors' commands ----------------------------------------------------------------------------------------


@pytest.fixture
def foreign(tmp_path):
    """A folder with another distribution's package `executors`, which is found before ours."""
    (tmp_path / "foreign" / "executors").mkdir(parents=True)
    (tmp_path / "foreign" / "executors" / "__init__.py").write_text("raise SystemExit('not ours')")
    return tmp_path / "foreign"


@pytest.mark.parametrize("where", ["installed", "checkout"])
def test_the_executors_commands_are_found(request, foreign, tmp_path, where):
    """Installed and in a checkout, beside a package of the same name: `count` counts with modules of ours."""
    root = ROOT if where == "checkout" else request.getfixturevalue("installed")
    code = f"""
import sys
sys.path[:0] = [{str(foreign)!r}, {str(root)!r}]
sys.argv[1:] = ["count", "--models", "sd15", "--sizes", "512", "--format", "json"]
from hybridsd_sim.cli import main
try:
    main()
finally:
    found = (module.__file__ for name, module in sys.modules.items() if name.endswith("executors.cli"))
    print(*found, file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows"][0]["params"] == 859_520_964
    folder = root if where == "checkout" else root / "hybridsd_sim"
    assert Path(done.stderr.splitlines()[-1]) == folder / "executors" / "cli.py"


@pytest.mark.parametrize(
    ("command", "extra"),
    [
        (("profile", "--models", "sd15", "--out", "out"), "executors"),
        (("run", "--model", "sd15", "--out", "image.png"), "executors"),
        (("count", "--models", "sd15"), "executors"),
        (("live", "run"), "live"),
        (("validate", "--out", "out"), "live"),
    ],
)
def test_without_the_extra_its_command_says_what_to_install(installed, tmp_path, command, extra):
    """Without torch the commands explain themselves, and refuse to run with the extra to install."""
    code = "import sys; sys.modules['torch'] = None; from hybridsd_sim.cli import main; main()"
    env = os.environ | {"PYTHONPATH": str(installed)}

    def said(*arguments):
        call = [sys.executable, "-c", code, *arguments]
        return subprocess.run(call, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)

    assert f"{command[0]} [OPTIONS]" in said(command[0], "--help").stdout
    refused = said(*command)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr == (
        f"error: {command[0]}: given; needs torch, which is not installed. pip install 'hybridsd-sim[{extra}]'\n"
    )
