"""The command line is a contract: commands, exit codes, what goes where, and messages that help."""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import hybridsd_sim
from hybridsd_sim.cli import main
from hybridsd_sim.cli_arguments import named_scenarios, output_aside
from hybridsd_sim.errors import RunError
from hybridsd_sim.files import data_folder
from hybridsd_sim.reporting import table, to_json
from hybridsd_sim.reporting.terminal import LONGEST_WORD, figure, with_interval

TINY = ("--set", "horizon_s=60", "--set", "warmup_s=10", "--set", "replications=1")
COMMANDS = (
    *("check", "predict", "simulate", "plan", "report", "verify", "serve", "trace"),
    *("profile", "run", "count", "live", "validate"),
)
needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")
HEAVY = {"torch", "diffusers", "pandas", "numpy", "scipy", "pyarrow", "matplotlib", "ray", "simpy", "rich"}
PREDICTED = {
    "latency_s", "denoise_s", "step_s", "compute_s", "comm_exposed_s", "comm_bytes", "flops", "gpu_seconds", "usd",
    "flops_without_attention_products", "edge_energy_j", "quality", "interval_s", "kind", "sources",
}  # fmt: skip


class Ran:
    """What a command did: exit code, standard output, standard error."""

    def __init__(self, code, out, err):
        self.code, self.out, self.err = code, out, err

    @property
    def json(self):
        """Standard output as JSON that stands alone and holds neither NaN nor infinity."""
        return json.loads(self.out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """The folder of finished simulations that all these tests share: none of them looks at the user's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HYBRIDSD_CACHE", str(folder := tmp_path_factory.mktemp("cache")))
        yield folder


@pytest.fixture
def cli(monkeypatch, capsys):
    """Run a command line in this process, as the installed command would."""

    def run(*arguments, code=0):
        monkeypatch.setattr(sys, "argv", ["hybridsd-sim", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        ran = Ran(stop.value.code or 0, *capsys.readouterr())
        assert ran.code == code, ran.err + ran.out
        return ran

    return run


@pytest.fixture
def refused(cli):
    """Run a command line that must be refused; the problems it named, one a line, and nothing else anywhere."""

    def run(*arguments):
        ran = cli(*arguments, code=2)
        assert ran.out == ""
        assert all(line.startswith("error: ") for line in ran.err.splitlines())
        return [line.removeprefix("error: ") for line in ran.err.splitlines()]

    return run


def start(*arguments, seed="0"):
    """Start the command in a process of its own, with a hash seed of its own."""
    command = [sys.executable, "-W", "error", "-m", "hybridsd_sim", *map(str, arguments)]
    env = {**os.environ, "PYTHONHASHSEED": seed}
    return subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finished(process):
    """What a started command did."""
    out, err = process.communicate(timeout=300)
    return Ran(process.returncode, out, err)


def shortened(value):
    """Arguments as the name of a test; messages are left out of it."""
    return " ".join(value) if isinstance(value, tuple) else "-"


def files(folder):
    """Every file of a folder with its content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="session")
def plans(tmp_path_factory):
    """The same plan made twice, by commands that hash differently and use one process and two."""
    folder = tmp_path_factory.mktemp("plans")
    what = ("plan", "quickstart", *TINY, "--no-cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HYBRIDSD_CACHE", str(folder / "cache"))
        started = [start(*what, "--jobs", n, "--out", folder / n, seed=n) for n in ("1", "2")]
    for process in started:
        ran = finished(process)
        assert ran.code == 0, ran.err
    return folder / "1", folder / "2"


@pytest.fixture(scope="session")
def runs(plans, tmp_path_factory):
    """The same simulation run twice, in two processes that hash differently; what they said and where they wrote."""
    folder = tmp_path_factory.mktemp("runs")
    what = ("simulate", "quickstart", *TINY, "--plan", plans[0] / "plan.yaml", "--format", "json")
    started = [start(*what, "--out", folder / seed, seed=seed) for seed in ("1", "2")]
    done = [finished(process) for process in started]
    assert [ran.code for ran in done] == [0, 0], done[0].err
    return done, (folder / "1", folder / "2")


@pytest.fixture
def plan_yaml(plans, tmp_path):
    """The plan with a text in it replaced, in a file of its own."""

    def write(old, new):
        text = (plans[0] / "plan.yaml").read_text()
        assert old in text
        (tmp_path / "plan.yaml").write_text(text.replace(old, new))
        return tmp_path / "plan.yaml"

    return write


# ---- Commands -------------------------------------------------------------------------------------------------------


def test_help_lists_the_commands_that_exist(cli):
    """`--help` and no arguments at all list exactly the commands that work."""
    listed = cli("--help").out.split("Commands:\n")[1]
    assert [line.split()[0] for line in listed.splitlines() if line.strip()] == list(COMMANDS)
    assert cli(code=2).err == "" or "Usage" in cli(code=2).err


@pytest.mark.parametrize("name", ["sell", "nonsense"])
def test_there_are_no_stubs(cli, name):
    """A command that does not exist yet is unknown, not empty."""
    assert f"No such command '{name}'" in cli(name, code=2).err


@pytest.mark.parametrize("name", [*COMMANDS, ("trace", "describe"), ("trace", "import")])
def test_every_command_explains_itself(cli, name):
    """Every command has a sentence and says what each of its options is, readable at 80 columns."""
    out = cli(*([name] if isinstance(name, str) else name), "--help").out
    assert "Usage: " in out
    assert max(map(len, out.splitlines())) <= 80


def test_help_lists_whole_sentences(cli):
    """The list of commands cuts no sentence off."""
    assert "..." not in cli("--help").out.split("Commands:")[1]


def test_version(cli):
    """`--version` prints the package's version alone."""
    assert cli("--version").out == f"{hybridsd_sim.__version__}\n"


def test_help_loads_nothing_heavy():
    """`python -m hybridsd_sim --help` is the same command and loads no large library, so that it answers at once."""
    command = [sys.executable, "-X", "importtime", "-m", "hybridsd_sim", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    loaded = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "typer" in loaded
    assert not loaded & HEAVY
    assert "Usage: python -m hybridsd_sim" in done.stdout


def test_check_says_what_was_read(cli):
    """`check` prints classes, fleets and pools in brief, and every change to the base."""
    out = cli("check", "quickstart", "--scenario", "busy", "--set", "seed=5").out
    assert "requests.picture" in out
    assert "20000 x snapdragon-8-gen-3 on wifi5" in out
    assert "requests.picture.arrivals.rate_per_s: 8.0 -> 16.0" in out
    assert "seed: 1 -> 5" in out


def test_a_call_outranks_an_override_which_outranks_the_base(cli):
    """`--set` goes before `--scenario`, which goes before the file."""

    def rate(*arguments):
        data = cli("check", "quickstart", "--format", "json", *arguments).json
        return data["requests"]["picture"]["arrivals"]["rate_per_s"]

    key = "requests.picture.arrivals.rate_per_s"
    assert rate() == 8.0
    assert rate("--scenario", "busy-on-lte") == 16.0
    assert rate("--scenario", "busy-on-lte", "--set", f"{key}=2.5") == 2.5


def test_values_of_set_mean_what_they_mean_in_a_file(cli):
    """`--set` reads numbers, lists, null and text with a hash or an equals sign as YAML does, comments apart."""
    values = ("horizon_s=1e3", "search.switch_steps=[5, 10]", "requests.picture.slo_s=null", "search.vaes=[taesd]")
    settings = [part for value in values for part in ("--set", value)]
    trace = ("--set", "requests.picture.arrivals={process: trace, path: 'a=b #1.csv'}")
    data = cli("check", "quickstart", "--format", "json", *settings, *trace).json
    assert data["horizon_s"] == 1000.0
    assert data["search"]["switch_steps"] == [5, 10]
    assert data["requests"]["picture"]["slo_s"] is None
    assert data["requests"]["picture"]["arrivals"]["path"].endswith("a=b #1.csv")


# ---- Predict --------------------------------------------------------------------------------------------------------


@pytest.fixture
def predict(cli):
    """The figures of a prediction; a hand-over from SD 1.4 to its 224M companion unless other models are named."""

    def run(*arguments, model="sd14"):
        return cli("predict", "--model", model, *arguments, "--format", "json").json

    return run


HYBRID = ("--small-model", "hybrid-sd-224m", "--num-inference-steps", "25")


def test_predict_has_the_figures_of_the_contract(predict):
    """The JSON of `predict` has every promised key; parts sum to the totals, each with its kind and sources."""
    figures = predict()
    assert set(figures) >= PREDICTED
    parts = [part for part in figures["parts"] if part["critical"]]
    assert sum(part["seconds"] for part in parts) == pytest.approx(figures["latency_s"])
    assert sum(part["usd"] for part in parts) == pytest.approx(figures["usd"])
    assert figures["compute_s"] + figures["comm_exposed_s"] == pytest.approx(figures["denoise_s"])
    assert figures["step_s"] == pytest.approx(figures["denoise_s"] / 50)
    low, high = figures["interval_s"]
    assert low <= figures["denoise_s"] <= high
    assert all(part["kind"] in ("measured", "quoted", "modelled") and part["sources"] for part in parts)
    assert figures["sources"]
    assert figures["unknown"] == {}


@pytest.mark.parametrize(("switch_step", "tera"), [(5, 18.89), (10, 22.64)])
def test_predict_counts_hybrid_sds_arithmetic(predict, switch_step, tera):
    """Hybrid SD (arXiv 2408.06646): FLOPs of 25 steps with a switch at 5 and at 10, to 0.1 %."""
    figures = predict(*HYBRID, "--switch-step", switch_step)
    assert figures["flops_without_attention_products"] == pytest.approx(tera * 1e12, rel=1e-3)
    assert figures["flops"] > figures["flops_without_attention_products"]


def test_more_cloud_steps_are_more_arithmetic(predict):
    """FLOPs grow with the switch step; at the last one the plan is the cloud's alone, and at 0 the edge's."""
    edge = ("--edge-device", "snapdragon-8-elite", "--network", "wifi5")
    swept = [predict(*HYBRID, *edge, "--switch-step", k) for k in (0, 5, 10, 25)]
    assert all(one["flops"] < two["flops"] for one, two in pairwise(swept))
    assert swept[0]["gpu_seconds"] == 0.0
    assert swept[0]["usd"] == 0.0
    alone = predict("--num-inference-steps", "25", "--network", "wifi5")
    assert {key: swept[-1][key] for key in PREDICTED} == {key: alone[key] for key in PREDICTED}


@pytest.mark.parametrize(
    ("arguments", "name", "reason"),
    [
        (("--gpu", "rtx-2080ti"), "usd", "no on_demand price for rtx-2080ti"),
        ((*HYBRID, "--switch-step", 5, "--edge-device", "snapdragon-x2-elite"), "edge_energy_j", "no power figure"),
        (("--small-model", "sd15", "--switch-step", 20), "quality", "no published quality for sd14 followed by sd15"),
    ],
)
def test_what_nobody_knows_is_null_with_a_reason(predict, cli, arguments, name, reason):
    """An unknown price, energy or quality is null and says why; everything else is still predicted."""
    figures = predict(*arguments)
    assert figures[name] is None
    assert list(figures["unknown"]) == [name]
    assert reason in figures["unknown"][name]
    assert figures["latency_s"] > 0
    assert f"{name} is not known: {reason}" in " ".join(cli("predict", "--model", "sd14", *arguments).out.split())


def test_every_method_at_one_gpu_is_single(predict):
    """`--method` is welcome at degree 1, where every method is `single`."""
    single = predict()
    for method in ("cfg_parallel", "distrifusion", "pcpp", "asyncdiff"):
        assert predict("--method", method)["denoise_s"] == single["denoise_s"]


def test_options_are_typed_and_lists_comma_separated(predict):
    """`--option` reads numbers and truth values; several may stand in one, separated by commas."""
    how = ("--method", "distrifusion", "--degree", "4")
    default, split = predict(*how, model="sdxl"), predict(*how, "--option", "guidance_split=true", model="sdxl")
    assert split["comm_bytes"] < default["comm_bytes"]
    how = ("--method", "asyncdiff", "--degree", "3")
    together = predict(*how, "--option", "stride=2,warmup_steps=3", model="sdxl")
    assert "stride=2 warmup_steps=3" in together["plan"]
    assert together == predict(*how, "--option", "warmup_steps=3", "--option", "stride=2", model="sdxl")


def test_a_measured_step_goes_before_every_source(predict):
    """`--measured-step-s` is one guided step: the loop is that many of them, and other degrees scale with it."""
    size = ("--height-px", "2048", "--width-px", "2048")
    own = predict(*size, "--measured-step-s", "0.8", model="sdxl")
    assert own["denoise_s"] == pytest.approx(50 * 0.8)
    assert any("--measured-step-s" in source for source in own["sources"])
    four = ("--method", "distrifusion", "--degree", "4")
    slow, fast = (predict(*size, *four, "--measured-step-s", step, model="sdxl") for step in ("1.6", "0.8"))
    assert slow["compute_s"] == pytest.approx(2 * fast["compute_s"], rel=0.05)


def test_the_size_is_the_models_own_unless_given(predict):
    """Without a size the model's native one counts; one side alone means a square."""
    native, square = predict(model="sdxl"), predict("--height-px", "1024", "--width-px", "1024", model="sdxl")
    assert native == square
    assert predict("--height-px", "512", model="sdxl") == predict("--width-px", "512", model="sdxl")


# ---- Bad input ------------------------------------------------------------------------------------------------------

BAD_PREDICTIONS = [
    (("--model", "sd41"), "--model: 'sd41'; no such name in the catalogue. Did you mean sd"),
    (("--gpu", "a1000"), "--gpu: 'a1000'; no such name in the catalogue. Did you mean"),
    (("--interconnect", "nvlink9"), "--interconnect: 'nvlink9'; no such name in the catalogue. Did you mean"),
    (("--method", "asincdiff"), "--method: 'asincdiff'; no such name in the catalogue. Did you mean asyncdiff"),
    (("--small-model", "sdxxl"), "--small-model: 'sdxxl'; no such name in the catalogue. Did you mean sdxl"),
    (("--edge-device", "iphone"), "--edge-device: 'iphone'; no such name in the catalogue. Did you mean iphone-1"),
    (("--network", "6g"), "--network: '6g'; no such name in the catalogue. Did you mean"),
    (("--runtime", "cudagraf"), "--runtime: 'cudagraf'; no such name in the catalogue. Did you mean cudagraph"),
    (("--degree", "2"), "--degree: 2; single runs on exactly 1 GPU. Choose a parallel method or degree 1."),
    (("--degree", "0"), "--degree: 0; must lie between 1 and 64. Leave it out for the default."),
    (("--degree", "-2", "--method", "pcpp"), "--degree: -2; must lie between 1 and 64."),
    (("--degree", "3", "--method", "cfg_parallel"), "--degree: 3; cfg_parallel has two branches, so it runs on 1 or 2"),
    (("--degree", "3", "--method", "distrifusion"), "--degree: 3 stripes; every activation's rows must divide by the"),
    (("--degree", "5", "--method", "pcpp"), "Stripe counts that fit this size: 1, 2, 4, 8."),
    (("--degree", "7", "--method", "asyncdiff"), "With stride 1 choose a degree of 2, 3, 4."),
    (("--degree", "2", "--method", "cfg_parallel", "--guidance-scale", "1"), "--guidance-scale: 1 or less; splitting"),
    (("--option", "stride=2"), "--option: stride=2; single has no options. Leave it out, or choose the method"),
    (("--option", "stride"), "--option: 'stride'; needs KEY=VALUE. For example --option stride=2."),
    (("--method", "pcpp", "--option", "stride=2"), "--option: 'stride'; pcpp has no such option."),
    (("--method", "pcpp", "--option", "guidance_split=no"), "guidance_split: no; must be true or false. The default"),
    (("--method", "pcpp", "--option", "partial=.nan"), "--option partial: nan; is a share of a neighbour's stripe"),
    (
        ("--method", "asyncdiff", "--option", "stride=1.5"),
        "--option stride: 1.5; must be a whole number. The default is",
    ),
    (("--height-px", "0"), "--height-px: 0; must lie between 64 and 16384. Leave it out for the default."),
    (("--width-px", "500"), "--width-px: 500; must be a multiple of 64"),
    (("--num-inference-steps", "0"), "--num-inference-steps: 0; must lie between 1 and 1000."),
    (("--guidance-scale", "nan"), "--guidance-scale: nan; must lie between 0 and 100."),
    (("--num-images", "0"), "--num-images: 0; must lie between 1 and 64. Leave it out for the default."),
    (("--num-images", "65"), "--num-images: 65; must lie between 1 and 64."),
    (("--model", "sdxl", "--gpu", "t4", "--num-images", "64"), "--gpu: t4; needs "),
    (("--guidance-scale", "-1"), "--guidance-scale: -1.0; must lie between 0 and 100."),
    (("--measured-step-s", "nan"), "--measured-step-s: nan; must be a finite number of seconds above 0."),
    (("--measured-step-s", "inf"), "--measured-step-s: inf; must be a finite number of seconds above 0."),
    (("--measured-step-s", "0"), "--measured-step-s: 0.0; must be a finite number of seconds above 0."),
    (("--switch-step", "5"), "--switch-step: 5; needs a --small-model. Name the model that goes on."),
    (("--small-model", "sd15"), "--small-model: sd15; needs a --switch-step. Give the first step that it does."),
    (("--small-model", "sd15", "--switch-step", "51"), "--switch-step: 51; must lie between 0 and 50."),
    (("--small-model", "sd15", "--switch-step", "-1"), "--switch-step: -1; must lie between 0 and 50."),
    (("--small-model", "sdxl", "--switch-step", "5"), "--small-model: sdxl; latent spaces must agree at a switch step"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_PREDICTIONS, ids=shortened)
def test_a_bad_prediction_is_refused_with_place_value_rule_and_remedy(refused, arguments, message):
    """Whatever is wrong with a question is said in one sentence that names the option; the exit code is 2."""
    base = () if arguments[0] == "--model" else ("--model", "sd14")
    problems = refused("predict", *base, *arguments)
    assert any(message in problem for problem in problems), problems
    assert all(problem.startswith("--") and problem.endswith((".", "?")) for problem in problems)


def test_everything_wrong_with_a_prediction_is_said_at_once(refused):
    """Five mistakes are five sentences."""
    wrong = ("--gpu", "x", "--network", "y", "--degree", "0", "--height-px", "-8", "--option", "stride=2")
    places = [problem.split(":")[0] for problem in refused("predict", "--model", "sd14", *wrong)]
    assert places == ["--gpu", "--network", "--degree", "--height-px", "--option"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("predict",), "--model"),
        (("predict", "--model", "sd14", "--degree", "two"), "--degree"),
        (("predict", "--model", "sd14", "--format", "xml"), "--format"),
        (("predict", "--model", "sd14", "--robust"), "--robust"),
        (("plan", "quickstart", "--jobs", "0"), "--jobs"),
        (("simulate",), "SCENARIO"),
        (("trace", "import", "x.csv"), "--out"),
    ],
)
def test_a_malformed_command_line_names_the_option(cli, arguments, said):
    """Options that are missing, unknown or of the wrong type are named on standard error; the exit code is 2."""
    ran = cli(*arguments, code=2)
    assert said in ran.err
    assert "Traceback" not in ran.err
    assert ran.out == ""


BAD_CALLS = [
    (("check", "nowhere.yaml"), "nowhere.yaml: No such file or directory; must be a file", "Shipped scenarios: "),
    (("check", "quickstart", "--scenario", "bsy"), "scenarios: 'bsy'; no such scenario or override", "mean busy"),
    (("check", "quickstart", "--set", "horizon"), "--set: 'horizon'; needs KEY=VALUE", "For example --set seed=2."),
    (("check", "quickstart", "--set", "=3"), "--set: '=3'; needs KEY=VALUE", "For example"),
    (("check", "quickstart", "--set", "sead=3"), "--set: sead: 3; no such key", "Did you mean seed"),
    (("check", "quickstart", "--set", "seed=3", "--set", "seed=4"), "'seed=4'; a key may be given once only", "Keep"),
    (("check", "quickstart", "--set", "horizon_s=.nan"), "horizon_s: NaN; must be a finite number", ""),
    (("check", "quickstart", "--set", "horizon_s=-1"), "--set: horizon_s: -1; must be greater than 0", ""),
    (("check", "quickstart", "--set", "edge.phones.device=nokia"), "edge.phones.device: 'nokia'; no such name", ""),
    (
        ("check", "quickstart", "--set", "search.policies=[best]"),
        "search.policies: 'best'; no such name",
        "Did you mean",
    ),
    (("simulate", "quickstart", "--policy", "best"), "--policy: 'best'; no such name", "Did you mean"),
    (("simulate", "quickstart", "--policy", ","), "--policy: nothing; needs a policy", "Known: cloud_only"),
    (("simulate", "quickstart", "--policy", "planned"), "--policy: planned; follows a plan, and none", "Add --plan"),
    (("simulate", "quickstart", "--seed", "-1"), "--seed: -1; must be greater than or equal to 0", ""),
    (
        ("simulate", "quickstart", "--seed", "2", "--set", "seed=3"),
        "--seed: given; --set seed says it too",
        "Keep one.",
    ),
    (("simulate", "quickstart", "--replications", "0"), "--replications: 0; must be greater than or equal to 1", ""),
    (("simulate", "quickstart", "--plan", "no.yaml"), "no.yaml: No such file or directory; a plan must be", "Give the"),
    (("plan", "quickstart", "--budget-usd-per-hour", "nan"), "--budget-usd-per-hour: NaN; must be a finite number", ""),
    (("plan", "quickstart", "--budget-usd-per-hour", "-3"), "--budget-usd-per-hour: -3.0; must be greater than 0", ""),
    (
        ("check", "quickstart", "--set", "requests.picture.arrivals.path=/nosuch"),
        "requests.picture.arrivals.path: '/nosuch'; is for trace and gentd26 only, and process is poisson",
        "Remove it, or choose another process.",
    ),
    (("report", "nowhere"), "nowhere: no saved run; lacks capacity.json", "Name a folder that `plan` or `simulate`"),
    (("report", "here", "--out", "x"), "--out: x; goes with --compare", "A run is drawn in its own folder."),
    (("report", "--compare", "here"), "--compare: here; two runs stand side by side", "Name two folders."),
    (("trace", "describe", "no.csv"), "no.csv: No such file or directory; a trace must be a readable CSV", "Check the"),
]


@pytest.mark.parametrize(("arguments", "message", "remedy"), BAD_CALLS, ids=shortened)
def test_bad_input_is_refused_with_place_value_rule_and_remedy(refused, arguments, message, remedy):
    """Whatever is wrong with files, keys and values is said in one sentence with its place; the exit code is 2."""
    (problem,) = refused(*arguments)
    assert message in problem
    assert remedy in problem
    assert ". " in problem, "a problem ends with its remedy"


def test_everything_wrong_with_a_call_is_said_at_once(refused, tmp_path):
    """Bad keys of the scenario, a bad plan and a bad folder are all named, before anything is simulated."""
    (tmp_path / "plan.yaml").write_text("nodes: 3\n")
    wrong = ("--set", "sead=1", "--set", "horizon_s=-1", "--plan", tmp_path / "plan.yaml", "--out", "/dev/null/x")
    problems = " ".join(refused("simulate", "quickstart", *wrong))
    for said in ("--set: sead", "--set: horizon_s", "plan.yaml: replicas: missing", "/dev/null/x: Not a directory"):
        assert said in problems


def test_names_and_policies_are_checked_together(refused):
    """An unknown device and an unknown policy are reported by one call."""
    wrong = ("--set", "search.policies=[best]", "--set", "pools.a100.gpu=b100")
    for command in ("check", "simulate"):
        assert len(refused(command, "quickstart", *wrong)) == 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name: a\nname: b\n", ":2: name: written twice; a key may stand once only. First on line 1."),
        ("name: [\n", "is not YAML"),
        ("- 1\n", "must be a mapping of keys"),
        ("name: a\nhorizon_s: .inf\n", ":2: horizon_s: .inf; must be a finite number."),
    ],
)
def test_a_bad_scenario_file_is_named_with_its_line(refused, tmp_path, text, said):
    """What is wrong in a file is said with its line."""
    (tmp_path / "s.yaml").write_text(text)
    problems = refused("check", tmp_path / "s.yaml")
    assert any(said in problem for problem in problems)
    assert all(problem.startswith(f"{tmp_path / 's.yaml'}:") for problem in problems)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("replicas:", "nodes:", "plan.yaml: replicas: missing; this key is required."),
        (
            "degree: 1",
            "degree: one",
            "plan.yaml: plans.picture[0].plan.stages[0].degree: 'one'; must be a valid integer.",
        ),
        ("start: 10", "start: 11", "plan.yaml: plan.stages[1]: [11, 25); stages must be non-empty and follow"),
        ("vae:", "vea:", "plan.yaml: plans.picture[0].plan.vea: unknown key; stands in no plan."),
        ("{a100: ", "{a100: -", "plan.yaml: replicas.a100: -"),
        ("{a100: ", "{h100: ", "plan: replicas: 'h100'; is not in the scenario."),
        ("  picture:", "  pictures:", "plan: plans: 'pictures'; is not in the scenario. Did you mean picture?"),
        (
            "name: a100,",
            "name: b100,",
            "plan: plans.picture[0].plan: a100-sxm-80gb in b100; the scenario has no pool or fleet",
        ),
        (
            "device: a100-sxm-80gb",
            "device: l4",
            "plan: plans.picture[0].plan: l4 in a100; the scenario has a100-sxm-80gb.",
        ),
        (
            "stop: 25",
            "stop: 30",
            "plan: plans.picture[0].plan: 30 steps; the scenario asks for 25. Plan this scenario anew.",
        ),
        (
            "model: hybrid-sd-224m",
            "model: sdxl",
            "plan: plans.picture[0].plan: sdxl; the scenario allows sd14, hybrid-sd-224m.",
        ),
        ("degree: 1", "degree: 4", "plan: plans.picture[0].plan: degree: 4; a gang stays inside one node"),
    ],
)
def test_a_plan_that_is_garbage_or_of_another_scenario_is_refused(refused, plan_yaml, old, new, said):
    """A plan.yaml that nobody could follow in this scenario is refused before anything is simulated."""
    problems = refused("simulate", "quickstart", "--plan", plan_yaml(old, new))
    assert any(said in problem for problem in problems), problems


@pytest.mark.parametrize("content", ["", "{{{", "[1, 2]", "just text", b"\xff\xfe\x00"])
def test_a_file_that_is_no_plan_is_refused(refused, tmp_path, content):
    """Empty, broken, binary: a file that is no plan.yaml is an input error that names it."""
    path = tmp_path / "plan.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert all(str(path) in problem for problem in refused("simulate", "quickstart", "--plan", path))


@pytest.mark.parametrize("command", ["simulate", "plan"])
def test_a_folder_that_cannot_be_written_is_refused_before_the_work(refused, tmp_path, command):
    """A report's folder that is a file, lies under one, or holds what no report wrote is refused at once."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    for out, said in (("file", "Not a directory"), ("file/deeper", "Not a directory"), ("full", "holds thesis.tex")):
        (problem,) = refused(command, "quickstart", "--out", tmp_path / out)
        assert str(tmp_path / out) in problem
        assert said in problem
    assert files(tmp_path) == {"file": b"mine", "full/thesis.tex": b"mine"}


def test_debug_shows_the_traceback(cli):
    """`--debug`, wherever it stands, adds the traceback to the message and changes no exit code."""
    for arguments in (("--debug", "check", "nowhere"), ("check", "nowhere", "--debug")):
        err = cli(*arguments, code=2).err
        assert "Traceback (most recent call last)" in err
        assert err.splitlines()[-1].startswith("error: nowhere: ")


@pytest.mark.parametrize("failure", [RunError("a law was broken"), RuntimeError("a law was broken")])
def test_a_run_that_fails_exits_with_1_and_leaves_nothing_behind(cli, tmp_path, monkeypatch, failure):
    """A failure while the report is drawn is one sentence and exit code 1; no half-written folder remains."""

    def fail(*arguments):
        raise failure

    monkeypatch.setattr("hybridsd_sim.reporting.folder.write_pages", fail)
    what = ("simulate", "quickstart", *TINY, "--policy", "edge_only", "--out", tmp_path / "run")
    ran = cli(*what, code=1)
    assert "a law was broken" in ran.err.splitlines()[-1]
    assert "Traceback" not in ran.err
    assert "Traceback" in cli(*what, "--debug", code=1).err
    assert list(tmp_path.iterdir()) == []


# ---- Runs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["plan", "simulate"])
def test_the_same_inputs_give_the_same_bytes(plans, runs, what):
    """Commands that hash differently, and `--jobs`, write the same files with the same bytes."""
    one, two = map(files, plans if what == "plan" else runs[1])
    assert {"index.html", "report.md", "summary.csv", "requests.parquet", "provenance.json"} <= set(one)
    assert list(one) == list(two)
    assert [name for name in one if one[name] != two[name]] == []


def test_policies_run_side_by_side_and_the_plan_is_followed(runs):
    """The scenario's policies and the plan's run on the same requests; JSON stands alone, progress beside it."""
    done, (folder, _) = runs
    data = done[0].json
    assert [run["policy"] for run in data["runs"]] == [
        "cloud_only",
        "edge_only",
        "static_switch",
        "cost_aware",
        "planned",
    ]
    assert len({run["summary"]["all"]["requests"]["value"] for run in data["runs"]}) == 1
    assert Path(data["report"]) == folder / "index.html"
    planned = data["runs"][-1]
    assert planned["summary"]["all"]["served"]["value"] > 0
    assert set(planned["verdict"]) == {"feasible", "stable", "converged", "in_domain"}
    inside = planned["summary"]["picture"]["slo_attainment"]
    assert inside["low"] <= inside["value"] <= inside["high"]
    for figures in (figures for run in data["runs"] for figures in run["summary"].values()):
        assert all(found["value"] is not None or found["note"] for found in figures.values())
    assert "simulating planned" in done[0].err


def test_a_scenario_may_name_rows_of_its_own(cli, tmp_path):
    """Rows that a scenario names go before the quoted ones: an A100 that was measured to be slow serves slowly."""
    text = (data_folder("scenarios") / "quickstart.yaml").read_text()
    (tmp_path / "slow.yaml").write_text(text.replace("search:", "search:\n  profiles: [mine]", 1))
    rows = tmp_path / "mine" / "measured" / "a100-sxm-80gb" / "sd15.csv"
    rows.parent.mkdir(parents=True)
    rows.write_text(
        "device,runtime,precision,model,component,height_px,width_px,guidance,seconds_median,kind,source,source_date\n"
        "a100-sxm-80gb,compiled,fp16,sd15,step,512,512,true,0.2,measured,a test,2026-11-21\n"
    )
    rows.with_suffix(".meta.yaml").write_text(
        "device: a100-sxm-80gb\ndate: 2026-11-21\nprotocol: {warmup_runs: 1, runs: 10}\n"
    )
    few = ("--set", "requests.picture.arrivals.rate_per_s=1", "--policy", "cloud_only")
    arguments = (*few, *TINY, "--format", "json")
    latencies_s = [
        cli("simulate", name, *arguments, "--out", tmp_path / f"{n}").json["runs"][0]["summary"]["all"]
        for n, name in enumerate(("quickstart", tmp_path / "slow.yaml"))
    ]
    usual, slow = (figures["latency_p50_s"]["value"] for figures in latencies_s)
    assert usual < 3.0 < 25 * 0.2 < slow


def test_a_run_says_what_made_it(runs):
    """The folder's provenance names version, profiles, seed and the changes that the call made."""
    provenance = json.loads((runs[1][0] / "provenance.json").read_text())
    assert provenance["version"] == hybridsd_sim.__version__
    assert provenance["profiles_digest"] == hybridsd_sim.load_profiles().digest
    assert "horizon_s: 600 -> 60" in provenance["overrides_applied"]


def test_policies_are_comma_separated_and_run_once(cli, tmp_path):
    """`--policy` takes a list, repeated or comma-separated; seed and replications have options of their own."""
    settings = ("--set", "horizon_s=60", "--set", "warmup_s=10", "--seed", "3", "--replications", "2")
    which = ("--policy", "edge_only,cost_aware", "--policy", "edge_only")
    ran = cli("simulate", "quickstart", *settings, *which, "--out", tmp_path / "run", "--format", "json")
    assert [run["policy"] for run in ran.json["runs"]] == ["edge_only", "cost_aware"]
    scenario = json.loads((tmp_path / "run" / "provenance.json").read_text())["scenario"]
    assert (scenario["seed"], scenario["replications"]) == (3, 2)


@pytest.mark.parametrize("columns", ["80", None])
def test_tables_fit_the_terminal_or_120_columns(cli, tmp_path, monkeypatch, columns, plans):
    """Text for people keeps to the terminal's width, 120 without one: verdict before figures, words unbroken."""
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr("os.get_terminal_size", lambda *_: (_ for _ in ()).throw(OSError))
    if columns:
        monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.chdir(tmp_path)
    plan = ("--plan", plans[0] / "plan.yaml", "--policy", "planned,cloud_only")
    shown = [
        cli("simulate", "quickstart", *TINY, *plan).out,
        cli("check", "photo-app").out,
        cli("predict", "--model", "sdxl", "--gpu", "rtx-2080ti").out,
    ]
    for out in shown:
        assert max(map(len, out.splitlines())) <= int(columns or 120)
        assert "…" not in out
    simulated = shown[0]
    assert simulated.index("feasible") < simulated.index("goodput")
    assert simulated.splitlines()[-1].startswith("report: reports/quickstart-")
    assert Path(simulated.splitlines()[-1].removeprefix("report: ")).is_file()


def test_the_default_folder_depends_on_what_ran(cli, tmp_path, monkeypatch, plans, plan_yaml):
    """Other policies or another plan.yaml never write over a run that has the same scenario."""
    monkeypatch.chdir(tmp_path)
    more = plan_yaml("{a100: ", "{a100: 1")
    for arguments in (("edge_only",), ("planned", "--plan", plans[0] / "plan.yaml"), ("planned", "--plan", more)):
        cli("simulate", "quickstart", *TINY, "--policy", *arguments)
    assert len(list(Path("reports").iterdir())) == 3


def test_a_plan_is_shown_with_everything_it_was_compared_with(cli, tmp_path):
    """`plan` in JSON: verdict, nodes, plans, baselines, frontier, reasons; the budget comes from the call."""
    ran = cli("plan", "quickstart", *TINY, "--budget-usd-per-hour", "1000", "--out", tmp_path / "p", "--format", "json")
    data = ran.json
    assert data["feasible"] is data["verdict"]["feasible"]["ok"]
    assert set(data["replicas"]) == {"a100"}
    assert set(data["plans"]) == {"picture"}
    assert {baseline["name"] for baseline in data["baselines"]} >= {"cloud only", "edge only"}
    assert data["frontier"]
    assert data["explanation"]
    assert data["usd_per_hour"] <= 1000
    assert "incumbent" in ran.err
    assert json.loads((tmp_path / "p" / "provenance.json").read_text())["scenario"]["budget"]["usd_per_hour"] == 1000.0


def test_a_plan_in_text_names_the_plan_and_the_report(cli, tmp_path):
    """`plan` as text: the verdict, the chosen plan, nodes, comparison, reasons, and the report's path at the end."""
    out = cli("plan", "quickstart", *TINY, "--out", tmp_path / "p").out
    order = ("feasible", "picture", "pool", "cloud only", "frontier", "- Rent", "report: ")
    at = [out.index(said) for said in order]
    assert at == sorted(at)
    assert out.endswith(f"report: {tmp_path / 'p' / 'index.html'}\n")


# ---- Long searches --------------------------------------------------------------------------------------------------


@pytest.fixture
def own_cache(monkeypatch, tmp_path):
    """A cache of one test's own, not made yet."""
    monkeypatch.setenv("HYBRIDSD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_finished_simulations_are_kept_and_change_no_answer(cli, own_cache, plans, tmp_path):
    """Without a cache, with an empty one and with a full one, a plan has the same bytes."""
    kept = []
    for run in ("cold", "warm"):
        cli("plan", "quickstart", *TINY, "--out", tmp_path / run)
        assert files(tmp_path / run) == files(plans[0])
        kept.append(set(files(own_cache)))
    assert kept[0]
    assert kept[0] == kept[1]


def test_no_cache_leaves_nothing(plans):
    """`--no-cache`, by which these plans were made, writes nothing beside the report."""
    assert sorted(path.name for path in plans[0].parent.iterdir()) == ["1", "2"]


def test_a_cache_that_cannot_be_written_is_said_once_and_done_without(cli, own_cache, tmp_path):
    """The plan is made all the same, and the message names the folder."""
    own_cache.write_text("a file in its place")
    err = cli("plan", "quickstart", *TINY, "--out", tmp_path / "run").err
    assert [str(own_cache) in line for line in err.splitlines()].count(True) == 1


NAMED = """
overrides:
  busy: {seed: 5}
  late: {warmup_s: 20}
"""


def test_robust_means_the_scenarios_of_the_file_else_its_overrides(tmp_path):
    """Each is resolved under the same options, which outrank it."""
    path = tmp_path / "named.yaml"
    base = (data_folder("scenarios") / "quickstart.yaml").read_text().partition("overrides:")[0]
    path.write_text(base + NAMED)
    named = named_scenarios(str(path), ["horizon_s=99"])
    assert {name: (one.seed, one.warmup_s, one.horizon_s) for name, one in named.items()} == {
        "busy": (5, 60.0, 99.0),
        "late": (1, 20.0, 99.0),
    }
    path.write_text(base + NAMED + "scenarios: {both: [busy, late]}")
    assert [(name, one.seed, one.warmup_s) for name, one in named_scenarios(str(path), None).items()] == [
        ("both", 5, 20.0)
    ]


def test_robust_needs_scenarios(refused, tmp_path):
    """A file that names none is refused, and so is Ray where it is not installed."""
    path = tmp_path / "alone.yaml"
    path.write_text((data_folder("scenarios") / "quickstart.yaml").read_text().partition("overrides:")[0])
    (said,) = refused("plan", path, "--robust")
    assert said.startswith("--robust: ")
    assert "neither scenarios nor overrides" in said


def test_ray_has_to_be_installed(refused, monkeypatch):
    """The message says how."""
    monkeypatch.setitem(sys.modules, "ray", None)
    (said,) = refused("plan", "quickstart", *TINY, "--no-cache", "--ray", "local")
    assert said.endswith("pip install 'hybridsd-sim[ray]'")


@needs_ray
@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "nonsense"])
def test_an_address_without_a_cluster_is_refused(refused, address):
    """Nobody there, or no address at all: the message names it, without minutes of trying."""
    (said,) = refused("plan", "quickstart", *TINY, "--no-cache", "--ray", address)
    assert said.startswith(f"--ray: {address}; no Ray cluster can be used there: ")


@pytest.mark.slow
@needs_ray
def test_ray_gives_the_same_bytes_and_leaves_standard_output_alone(plans, tmp_path):
    """`--ray local` writes the report that one process writes; JSON stands alone on standard output."""
    what = ("plan", "quickstart", *TINY, "--no-cache", "--ray", "local", "--jobs", "2", "--format", "json")
    ran = finished(start(*what, "--out", tmp_path / "ray"))
    assert ran.code == 0, ran.err
    assert ran.json["plans"]
    assert files(tmp_path / "ray") == files(plans[0])


@pytest.mark.parametrize("jobs", [pytest.param("1", marks=pytest.mark.slow), "2"])
def test_an_interrupted_plan_says_what_it_keeps(own_cache, tmp_path, jobs):
    """Ctrl-C ends it with exit code 130, without a traceback and without a report; what was finished stays."""
    what = ("plan", "quickstart", "--set", "horizon_s=6000", "--set", "search.replications_max=50")
    process = start(*what, "--jobs", jobs, "--out", tmp_path / "run")
    while process.poll() is None and not any(own_cache.rglob("*.json")):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    ran = finished(process)
    assert ran.code == 130, ran.err
    assert re.search(rf"interrupted: [1-9]\d* finished simulations are kept in {own_cache}; run the same", ran.err)
    assert "Traceback" not in ran.err
    assert ran.out == ""
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_plan_that_is_killed_gives_the_same_answer_when_it_is_run_again(own_cache, plans, tmp_path):
    """After SIGKILL in the middle the same command writes the bytes of a run in peace."""
    what = ("plan", "quickstart", *TINY, "--jobs", "2", "--out", tmp_path / "run")
    process = start(*what)
    while process.poll() is None and not any(own_cache.rglob("*.json")):
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert finished(start(*what)).code == 0
    assert files(tmp_path / "run") == files(plans[0])


# ---- Reports and traces ---------------------------------------------------------------------------------------------


def test_a_saved_run_drawn_again_is_the_same(cli, runs):
    """`report RUN` writes the same bytes that were there."""
    before = files(runs[1][0])
    assert cli("report", runs[1][0]).out == f"report: {runs[1][0] / 'index.html'}\n"
    assert files(runs[1][0]) == before


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("capacity.json", b"{", "capacity.json: JSONDecodeError: "),
        ("capacity.json", b"[3]", "capacity.json: ValueError: no mapping of keys"),
        ("capacity.json", b'{"format": 3}', ": KeyError: "),
        ("provenance.json", b"\xff", "provenance.json: UnicodeDecodeError: "),
        ("requests.parquet", b"PAR1", "requests.parquet: ArrowInvalid: "),
    ],
)
def test_a_damaged_run_is_wrong_input(cli, runs, tmp_path, file, content, words):
    """A file cut off or emptied: exit code 2, and which file it is; two runs of which one is damaged likewise."""
    folder = Path(shutil.copytree(runs[1][0], tmp_path / "damaged"))
    (folder / file).write_bytes(content)
    found = cli("report", folder, code=2).err
    assert words in found
    assert "is damaged, so that it cannot be drawn. Run the scenario again." in found
    if file != "requests.parquet":
        found = cli("report", "--compare", folder, runs[1][0], "--out", tmp_path / "both", code=2).err
        assert words in found
        assert not (tmp_path / "both").exists()


def test_two_runs_side_by_side(cli, runs, plans, tmp_path, monkeypatch):
    """`report --compare A B`, in either order of words, draws both into a folder of its own."""
    monkeypatch.chdir(tmp_path)
    a, b = runs[1][0], plans[0]
    page = f"reports/{a.name}-vs-{b.name}/index.html"
    assert cli("report", "--compare", a, b).out == f"report: {page}\n"
    first = Path(page).read_bytes()
    assert cli("report", a, "--compare", b, "--format", "json").json == {"reports": [page]}
    assert Path(page).read_bytes() == first
    cli("report", a, "--compare", b, "--out", "both")
    assert files(Path("both")) == files(Path(page).parent)


@pytest.fixture
def trace_csv(tmp_path):
    """A small trace in the plain layout."""
    rows = "".join(f"{10 * n},{30 if n % 4 else 50},model-{n % 3}\n" for n in range(20))
    path = tmp_path / "trace.csv"
    path.write_text(f"arrival_s,num_inference_steps,base_model\n{rows}")
    return path


def test_a_trace_is_described(cli, trace_csv):
    """`trace describe` says how many requests there are, how fast they come and what they ask for."""
    data = cli("trace", "describe", trace_csv, "--format", "json").json
    assert (data["requests"], data["rate_per_s"]) == (20, 0.1)
    out = cli("trace", "describe", trace_csv).out
    assert "30: 0.750, 50: 0.250" in out


def test_an_imported_trace_can_be_described_and_replayed(cli, trace_csv, tmp_path):
    """`trace import` writes a file that `trace describe` reads the same and a scenario can replay."""
    out = tmp_path / "imported.csv"
    assert cli("trace", "import", trace_csv, "--out", out).out == f"20 requests: {out}\n"
    described = [cli("trace", "describe", path, "--format", "json").json for path in (trace_csv, out)]
    assert described[0] == described[1]
    arrivals = f"requests.picture.arrivals={{process: trace, path: '{out}', rate_per_s: null}}"
    what = ("--set", "horizon_s=300", "--set", "replications=1", "--set", arrivals, "--policy", "edge_only")
    run = cli("simulate", "quickstart", *what, "--out", tmp_path / "run", "--format", "json").json["runs"][0]
    assert run["summary"]["all"]["requests"]["value"] == 14  # of 20, six come in the warm-up


def test_a_trace_that_cannot_be_written_is_refused(refused, trace_csv, tmp_path):
    """`trace import` into a folder that is not there is an input error that names the file."""
    (problem,) = refused("trace", "import", trace_csv, "--out", tmp_path / "no" / "out.csv")
    assert str(tmp_path / "no" / "out.csv") in problem


# ---- Tables ---------------------------------------------------------------------------------------------------------

CELLS = st.lists(
    st.text(st.characters(codec="ascii", categories=("L", "N")), min_size=1, max_size=LONGEST_WORD), max_size=6
)


@given(st.lists(st.tuples(CELLS, CELLS, CELLS, CELLS), min_size=1, max_size=4), st.integers(80, 160))
def test_a_table_breaks_no_word_and_keeps_its_width(rows, width):
    """Every word of every cell stands whole in the table, whose lines are no longer than asked."""
    text = table(("a", "b", "c", "d"), [[" ".join(cell) for cell in row] for row in rows], width)
    assert max(map(len, text.splitlines())) <= width
    words = text.split()
    for row in rows:
        assert all(word in words for cell in row for word in cell)


def test_columns_that_do_not_fit_stand_below_beside_the_keys():
    """A table too wide for the terminal continues in a second block that repeats its first columns."""
    text = table(("policy", "first", "second"), [("edge_only", "x" * 30, "y" * 30)], 50)
    blocks = text.split("\n\n")
    assert [block.splitlines()[0].split() for block in blocks] == [["policy", "first"], ["policy", "second"]]
    assert all("edge_only" in block for block in blocks)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "-"),
        (float("nan"), "-"),
        (True, "yes"),
        (0.123456, "0.123"),
        (12345.6, "12,300"),
        (7, "7"),
        (1e-7, "1.00e-7"),
    ],
)
def test_figures_have_three_digits(value, shown):
    """Figures are short, unknown ones are a dash."""
    assert figure(value) == shown


def test_an_interval_is_shown_once_it_says_something():
    """An interval stands in brackets behind its figure, an unknown end as a question mark; none if both are unknown."""
    assert with_interval({"value": 1.0, "low": 0.5, "high": 2.0}) == "1.00 [0.500-2.00]"
    assert with_interval((1.0, 0.5, None)) == "1.00 [0.500-?]"
    assert with_interval((1.0, float("nan"), float("nan"))) == "1.00"
    assert with_interval({"value": 2.0, "low": 2.0, "high": 2.0}) == "2.00"
    assert with_interval({"value": None, "low": None, "high": None}) == "-"


@given(
    st.recursive(
        st.one_of(st.none(), st.floats(), st.text()),
        lambda inner: st.one_of(st.lists(inner), st.dictionaries(st.text(), inner)),
    )
)
def test_json_holds_no_nan(data):
    """Whatever is printed as JSON parses, and what is no number is null."""
    json.loads(to_json(data), parse_constant=pytest.fail)


def test_what_libraries_print_does_not_spoil_a_result(capfd):
    """While a plan is made, standard output leads to standard error, for code in C as for Python."""
    with output_aside():
        ctypes.CDLL(None).printf(b"from C\n")
        sys.stdout.write("from Python\n")
    sys.stdout.write("the result\n")

    said = capfd.readouterr()
    assert said.out == "the result\n"
    assert "from C" in said.err
    assert "from Python" in said.err
