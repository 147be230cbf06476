"""Scenarios: the grammar and its precedence, strictness and its messages, the traps closed, and the shipped files."""

from __future__ import annotations

import json
import pickle
import re
import string
from contextlib import suppress
from itertools import permutations
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from hybridsd_sim.errors import InputError
from hybridsd_sim.scenario import ArrivalSpec, EdgeFleet, Pool, Scenario, dump_yaml, load_scenario, load_yaml
from hybridsd_sim.scenario.schema import SPOT_PREEMPTIONS_PER_NODE_HOUR, scenario_schema

FOLDER = Path(__file__).parents[2] / "scenarios"
SHIPPED = ("quickstart", "photo-app", "studio-2k", "gentd26")
BASE = """\
name: tiny
horizon_s: 600
requests:
  app:
    origin: phones
    model: sd14
    height_px: 512
    width_px: 512
    num_inference_steps: 25
    arrivals: {process: poisson, rate_per_s: 1.5}
edge:
  phones: {device: snapdragon-8-elite, replicas: 10, network: lte}
pools:
  cloud:
    gpu: l40s
    replicas_max: 4
"""
GRAMMAR = """\
overrides:
  peak: {requests.app.arrivals.rate_per_s: 3.0}
  wifi:
    edge:
      phones: {network: wifi5}
  spot: {pools.cloud.purchase: spot}
scenarios:
  rush: [peak, wifi]
  all: [rush, spot]
"""


@pytest.fixture
def write(tmp_path):
    """Write a scenario's file and return its path."""

    def _write(text, name="tiny.yaml"):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return _write


@pytest.fixture
def refused(write):
    """The message with which a file is refused, its path cut to its name."""

    def _refused(text, **call):
        path = write(text)
        with pytest.raises(InputError) as caught:
            load_scenario(path, **call)
        return str(caught.value).replace(str(path), path.name)

    return _refused


def changed(old, new, text=BASE):
    """The base with one piece of text replaced."""
    assert old in text
    return text.replace(old, new)


# What a valid file becomes


def test_a_file_becomes_a_scenario_with_every_default_written_out(write):
    """The resolved scenario holds what the file says, and defaults for what it leaves out."""
    scenario = load_scenario(write(BASE))

    assert scenario.requests["app"].arrivals == ArrivalSpec(process="poisson", rate_per_s=1.5)
    assert (scenario.seed, scenario.replications, scenario.warmup_s) == (1, 1, 0.0)
    assert scenario.pools["cloud"].discipline == "fifo"
    assert scenario.to_dict()["search"]["static_switch"] == 0.4
    assert scenario.overrides_applied == ()


def test_entries_keep_the_order_of_the_file(write):
    """Request classes stay in the order they are written in, because their positions number them."""
    text = changed("requests:\n", "requests:\n  zebra:\n" + "".join(BASE.splitlines(keepends=True)[4:10]))

    assert list(load_scenario(write(text)).requests) == ["zebra", "app"]


def test_a_shipped_scenario_is_found_by_its_bare_name():
    """`quickstart` means the shipped file of that name."""
    assert load_scenario("quickstart") == load_scenario(FOLDER / "quickstart.yaml")


def test_a_file_that_is_not_there_is_refused_with_the_shipped_names(tmp_path):
    """A missing file is an input error that lists what is shipped."""
    with pytest.raises(
        InputError, match=r"nowhere\.yaml: No such file or directory; .*Shipped scenarios: .*quickstart"
    ):
        load_scenario(tmp_path / "nowhere.yaml")


def test_a_folder_or_a_binary_file_is_refused(tmp_path):
    """What cannot be read as text is an input error too, not a traceback."""
    (tmp_path / "image.yaml").write_bytes(b"\xff\xfe\x00")

    with pytest.raises(InputError, match="must be a file that can be read"):
        load_scenario(tmp_path)
    with pytest.raises(InputError, match="UTF-8"):
        load_scenario(tmp_path / "image.yaml")


def test_profiles_in_the_file_are_relative_to_the_file(write):
    """Folders of measured rows are found beside their scenario."""
    path = write(BASE + "search: {profiles: [mine, ../theirs]}\n")
    folder = path.parent.resolve()
    assert load_scenario(path).search.profiles == (str(folder / "mine"), str(folder.parent / "theirs"))


def test_a_path_in_the_file_is_relative_to_the_file(write, monkeypatch, tmp_path_factory):
    """A trace is found beside its scenario, wherever the command runs; a path of the call stays as it was given."""
    path = write(changed("rate_per_s: 1.5", "path: traces/day.csv").replace("poisson", "trace"))
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))

    assert load_scenario(path).requests["app"].arrivals.path == str(path.parent.resolve() / "traces" / "day.csv")
    call = {"requests.app.arrivals.path": "mine #1.csv"}
    assert load_scenario(path, overrides=call).requests["app"].arrivals.path == "mine #1.csv"


def test_a_scenario_is_a_value(write):
    """Equal scenarios have equal hashes and digests, and survive pickling, as worker processes need."""
    scenario = load_scenario(write(BASE))
    again = load_scenario(write(BASE, "other.yaml"))

    assert (scenario, hash(scenario), scenario.digest) == (again, hash(again), again.digest)
    assert pickle.loads(pickle.dumps(scenario)) == scenario  # noqa: S301 -- our own bytes
    assert re.fullmatch("[0-9a-f]{64}", scenario.digest)


def test_the_digest_forgets_the_way_and_keeps_the_content(write):
    """The same resolved scenario has one digest, whether an override or the file said it; another has another."""
    said = load_scenario(write(changed("horizon_s: 600", "horizon_s: 60.0")))
    called = load_scenario(write(BASE), overrides={"horizon_s": 60})

    assert said.digest == called.digest != load_scenario(write(BASE)).digest
    assert called.overrides_applied == ("horizon_s: 600 -> 60",)


# Base, overrides, scenarios


def test_scenarios_name_overrides_and_other_scenarios(write):
    """A scenario applies its overrides, and those of the scenarios it names, and logs each change."""
    scenario = load_scenario(write(BASE + GRAMMAR), scenario="all")

    assert scenario.overrides_applied == (
        "requests.app.arrivals.rate_per_s: 1.5 -> 3.0",
        "edge.phones.network: lte -> wifi5",
        "pools.cloud.purchase: on_demand -> spot",
    )
    assert scenario.pools["cloud"].purchase == "spot"


def test_an_override_can_be_chosen_like_a_scenario(write):
    """The name of a single override is as good as a scenario that lists it."""
    assert load_scenario(write(BASE + GRAMMAR), scenario="spot").pools["cloud"].purchase == "spot"


def test_without_a_choice_the_base_is_left_alone(write):
    """Overrides do nothing unless they are chosen."""
    assert load_scenario(write(BASE + GRAMMAR)) == load_scenario(write(BASE, "plain.yaml"))


def test_an_override_reached_twice_applies_once(write):
    """Two scenarios that share an override do not conflict with each other."""
    scenario = load_scenario(write(BASE + GRAMMAR + "  twice: [rush, peak, all]\n"), scenario="twice")

    assert len(scenario.overrides_applied) == 3


def test_an_override_may_add_an_entry_and_null_removes_one(write):
    """A block with a GPU is a new pool; null takes a pool away; lists are replaced, not joined."""
    text = BASE + (
        "search: {degrees: [1, 2]}\n"
        "overrides:\n  swap: {pools: {cloud: null, big: {gpu: h100-sxm, replicas_max: 2}}, search.degrees: [4]}\n"
        "  more: {pools.big.replicas_max: 3}\n  less: {pools.big.replicas_min: 1}\n"
        "scenarios: {both: [swap, less]}\n"
    )
    scenario = load_scenario(write(text), scenario="both")

    assert {name: (pool.gpu, pool.replicas_min) for name, pool in scenario.pools.items()} == {"big": ("h100-sxm", 1)}
    assert scenario.search.degrees == (4,)
    assert "search.degrees: [1, 2] -> [4]" in scenario.overrides_applied


def test_the_log_names_the_default_that_a_change_replaces(write):
    """The old value of a key that the file leaves out is its default."""
    scenario = load_scenario(write(BASE), overrides={"budget.usd_per_hour": 5, "seed": 2})

    assert scenario.overrides_applied == ("budget.usd_per_hour: null -> 5", "seed: 1 -> 2")


@given(
    base=st.integers(1, 50),
    override=st.none() | st.integers(1, 50),
    call=st.none() | st.integers(1, 50),
    nested=st.booleans(),
)
def test_call_outranks_override_outranks_base(tmp_path_factory, base, override, call, nested):
    """Precedence is call, then override, then base, however the override is written."""
    block = ""
    if override is not None:
        change = f"edge: {{phones: {{replicas: {override}}}}}" if nested else f"edge.phones.replicas: {override}"
        block = f"overrides:\n  other: {{{change}}}\n"
    path = tmp_path_factory.mktemp("precedence") / "case.yaml"
    path.write_text(changed("replicas: 10", f"replicas: {base}") + block)
    scenario = load_scenario(
        path,
        scenario="other" if block else None,
        overrides=None if call is None else {"edge.phones.replicas": str(call)},
    )
    expected = next(value for value in (call, override, base) if value is not None)

    assert scenario.edge["phones"].replicas == expected
    assert (scenario.overrides_applied == ()) == (len({base, override or base, call or override or base}) == 1)


def test_the_order_of_overrides_does_not_matter(write):
    """Because two overrides of one scenario never set the same key, any order resolves to the same scenario."""
    digests = set()
    for number, order in enumerate(permutations(("peak", "wifi", "spot"))):
        path = write(f"{BASE}{GRAMMAR}  mixed: [{', '.join(order)}]\n", f"{number}.yaml")
        digests.add(load_scenario(path, scenario="mixed").digest)

    assert len(digests) == 1


@given(
    rate=st.floats(1e-6, 1e6),
    horizon=st.floats(1, 1e9),
    options=st.dictionaries(
        st.text(string.ascii_letters, min_size=1, max_size=8),
        st.lists(st.booleans() | st.integers(-5, 5) | st.text(max_size=5), min_size=1, max_size=3),
        max_size=3,
    ),
    gpu=st.text(min_size=1, max_size=8),
)
def test_what_is_dumped_loads_as_the_same_scenario(tmp_path_factory, rate, horizon, options, gpu):
    """A resolved scenario written as YAML resolves to itself, log included."""
    folder = tmp_path_factory.mktemp("round-trip")
    (folder / "a.yaml").write_text(BASE)
    first = load_scenario(folder / "a.yaml").with_overrides(
        {
            "requests.app.arrivals.rate_per_s": rate,
            "horizon_s": horizon,
            "search.options": {"asyncdiff": options},
            "pools.cloud.gpu": gpu,
        }
    )
    (folder / "b.yaml").write_text(dump_yaml(first.to_dict()), encoding="utf-8")
    second = load_scenario(folder / "b.yaml")

    assert second == first
    assert second.digest == first.digest


def test_text_of_the_call_means_what_it_means_in_a_file(write):
    """What a command line passes is read as YAML: numbers, lists, truth values, null, quoted text."""
    call = {
        "horizon_s": "1e3",
        "search.degrees": "[1, 2, 4]",
        "edge.phones.encodes_prompt": "false",
        "requests.app.slo_s": "null",
        "pools.cloud.provider": "'123'",
        "name": " rush-hour ",
    }
    scenario = load_scenario(write(BASE), overrides=call)

    assert (scenario.horizon_s, scenario.search.degrees, scenario.name) == (1000.0, (1, 2, 4), "rush-hour")
    assert scenario.edge["phones"].encodes_prompt is False
    assert scenario.pools["cloud"].provider == "123"


def test_with_overrides_returns_a_validated_copy(write):
    """A change makes a new scenario, leaves the old one alone, and takes text as text."""
    scenario = load_scenario(write(BASE))
    other = scenario.with_overrides({"edge": {"phones": {"device": "42"}}, "search.degrees": (1, 2)})

    assert (other.edge["phones"].device, other.search.degrees) == ("42", (1, 2))
    assert scenario.edge["phones"].device == "snapdragon-8-elite"
    with pytest.raises(
        InputError, match=r"^with_overrides: edge\.phones\.replicas: -5; must be greater than or equal to 1"
    ):
        scenario.with_overrides({"edge.phones.replicas": -5})


# What is refused, and what the message says


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ("replicas_max: 4", "replcas_max: 4", 16, "pools.cloud.replcas_max: 4; no such key. Did you mean replicas_max"),
        ("horizon_s: 600", "horizon: 600", 2, "horizon: 600; no such key. Did you mean horizon_s"),
        ("rate_per_s: 1.5", "rate_per_s: 1.5, cvv: 2", 10,
         "requests.app.arrivals.cvv: 2; no such key. Did you mean cv"),
        ("network: lte", "network: lte, netwrk: lte", 12,
         "edge.phones.netwrk: 'lte'; no such key. Did you mean network"),
        ("    gpu: l40s\n", "", 14, "pools.cloud.gpu: missing; this key is required. gpu: GPU of the catalogue"),
        ("name: tiny\n", "", 1, "name: missing; this key is required"),
        ("replicas_max: 4", "replicas_max: -4", 16, "pools.cloud.replicas_max: -4; must be greater than or equal to 0"),
        ("replicas: 10", "replicas: 1.5", 12, "edge.phones.replicas: 1.5; must be a valid integer"),
        ("replicas: 10", "replicas: '10'", 12, "edge.phones.replicas: '10'; must be a valid integer"),
        ("device: snapdragon-8-elite", "device: 8", 12,
         "edge.phones.device: 8; must be a valid string. Put it in quotes"),
        ("width_px: 512", "width_px: 510", 8, "requests.app.width_px: 510; must be a multiple of 8"),
        ("poisson", "poison", 10, "requests.app.arrivals.process: 'poison'; must be 'poisson', 'gamma'"),
        ("poisson, rate_per_s: 1.5", "daily", 10,
         "requests.app.arrivals.rate_per_s: null; must be a number when process is daily"),
        ("poisson", "trace", 10, "requests.app.arrivals.path: null; must name a file when process is trace"),
        ("rate_per_s: 1.5", "rate_per_s: 1.5, time_scale: 2", 10,
         "requests.app.arrivals.time_scale: 2.0; is for trace and gentd26 only, and process is poisson"),
        ("rate_per_s: 1.5", "rate_per_s: 1.5, cv: 2", 10,
         "requests.app.arrivals.cv: 2.0; is for gamma only, and process is poisson"),
        ("origin: phones", "origin: phone", 5,
         "requests.app.origin: 'phone'; must name an edge fleet of this scenario. Did you mean phones"),
        ("horizon_s: 600", "horizon_s: 600\nwarmup_s: 600", 3, "warmup_s: 600.0; must be shorter than horizon_s, 600"),
        ("replicas_max: 4", "replicas_max: 4\n    replicas_min: 5", 17,
         "pools.cloud.replicas_min: 5; must not exceed replicas_max, which is 4"),
        ("replicas_max: 4", "replicas_max: 4\n    replicas: 5", 17,
         "pools.cloud.replicas: 5; must lie between replicas_min and replicas_max, 0 to 4"),
        ("  app:", "  all:", 4,
         "requests.all: 'all'; must not be a class's name, because the summary's row over every class has it. Give"),
        ("  cloud:", "  my cloud:", 14, "pools.my cloud: 'my cloud'; must match pattern"),
        ("name: tiny", "name: tiny\nsearch: {vaes: []}", 2, "search.vaes: []; must have at least 1 item"),
        ("name: tiny", "name: tiny\nsearch: {options: {asyncdiff: {stride: [[1]]}}}", 2,
         "search.options.asyncdiff.stride[0]: [1]; must be true, false, a number or text"),
        ("name: tiny", "name: tiny\noverride: {}", 2, "override: {}; no such key. Did you mean overrides"),
        ("name: tiny", "name: tiny\nbudget: 5", 2, "budget: 5; must be a mapping of keys"),
    ],
)  # fmt: skip
def test_a_problem_names_file_line_path_value_rule_and_remedy(refused, old, new, line, message):
    """Whatever is wrong is reported at its place, with the value, the rule and, where there is one, the way out."""
    assert f"tiny.yaml:{line}: {message}" in refused(changed(old, new))


def test_all_problems_come_at_once_in_the_order_of_the_file(refused):
    """One reading finds them all: YAML's, the schema's, those between fields, the grammar's and those of the call."""
    text = BASE + GRAMMAR
    for old, new in (
        ("horizon_s: 600", "horizon_s: .inf"),
        ("origin: phones", "origin: phone"),
        ("width_px: 512", "width_px: 510"),
        ("rate_per_s: 1.5", "rate_per_s: 1.5, rate_per_s: 2"),
        ("replicas: 10", "replicas: ten"),
        ("gpu: l40s", "gpuu: l40s"),
        ("rate_per_s: 3.0", "rate_per_s: -3"),
        ("[peak, wifi]", "[peak, wify]"),
    ):
        text = changed(old, new, text)
    message = refused(text, overrides={"pools.cloud.replicas_max": "0.5"})
    lines = message.splitlines()

    assert len(lines) == 10
    assert [int(line.split(":")[1]) for line in lines[:-1]] == [2, 5, 8, 10, 12, 14, 15, 18, 24]
    assert lines[-1].startswith("--set: pools.cloud.replicas_max: 0.5; must be a valid integer")


def test_a_bad_value_of_an_override_is_reported_where_it_stands(refused):
    """A wrong override is found although nobody chose it, at the override's own line."""
    message = refused(BASE + changed("purchase: spot", "purchase: spott", GRAMMAR))

    assert message.startswith("tiny.yaml:22: pools.cloud.purchase: 'spott'; must be 'on_demand' or 'spot'")


def test_overrides_that_need_each_other_are_fine_apart(write):
    """A rule between two fields is not held against an override whose companion sets the other field."""
    text = BASE + (
        "overrides:\n  floor: {pools.cloud.replicas_min: 6}\n  roof: {pools.cloud.replicas_max: 8}\n"
        "scenarios: {grown: [floor, roof]}\n"
    )
    pool = load_scenario(write(text), scenario="grown").pools["cloud"]

    assert (pool.replicas_min, pool.replicas_max) == (6, 8)


@pytest.mark.parametrize("second", ["{requests: {app: {arrivals: {rate_per_s: 5}}}}", "{requests.app.arrivals: {}}"])
def test_two_overrides_of_one_scenario_may_not_set_the_same_key(refused, second):
    """A conflict is an error that names the key and both overrides, also when one sets a part of the other's key."""
    text = BASE + GRAMMAR.replace("scenarios:", f"  busy: {second}\nscenarios:") + "  clash: [rush, busy]\n"

    message = refused(text)

    assert re.search(r"tiny\.yaml:27: scenarios\.clash: requests\.app\.arrivals\S* set by peak and busy; ", message)
    assert "the overrides of one scenario may not set the same key. Keep one of them." in message


def test_an_override_may_not_set_a_key_twice(refused):
    """Dotted and nested writing of one key in one block is a conflict too."""
    text = BASE + "overrides:\n  odd: {pools.cloud.replicas_max: 3, pools: {cloud: {replicas_max: 5}}}\n"

    assert "overrides.odd: pools.cloud.replicas_max set by odd twice" in refused(text)


def test_a_scenario_may_not_contain_itself(refused):
    """A cycle of scenarios is reported with its path."""
    text = BASE + GRAMMAR + "  one: [two]\n  two: [peak, one]\n"

    assert "one -> two -> one; a scenario may not contain itself" in refused(text)


def test_unknown_overrides_and_scenarios_are_refused_with_the_closest_name(refused):
    """A misspelt member and a misspelt choice name what was probably meant."""
    text = BASE + changed("[peak, wifi]", "[peek, wifi]", GRAMMAR)

    assert (
        "tiny.yaml:24: scenarios.rush: 'peek'; no such override or scenario in this file. Did you mean peak"
        in refused(text)
    )
    assert "'rosh'; no such scenario or override in this file. Did you mean rush" in refused(
        BASE + GRAMMAR, scenario="rosh"
    )
    assert "tiny.yaml:24: scenarios.spot: 'spot'; may not also name an override" in refused(
        BASE + changed("  rush:", "  spot: [peak]\n  rush:", GRAMMAR)
    )


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("pools.clod.replicas_max", "--set: pools.clod.replicas_max: 3; pools has no 'clod'. Did you mean cloud?"),
        ("pools.cloud.replica_max", "--set: pools.cloud.replica_max: 3; no such key. Did you mean replicas_max"),
        ("horizon", "--set: horizon: 3; no such key. Did you mean horizon_s"),
        ("horizon_s.x", '--set: horizon_s: {"x": 3}; must be a valid number'),
        ("", "no such key"),
    ],
)
def test_an_unknown_key_of_the_call_is_refused_with_the_closest(refused, key, message):
    """`--set` cannot set what does not exist, nor add an entry by a misspelt name."""
    assert message in refused(BASE, overrides={key: 3})


def test_a_misspelt_entry_in_an_override_is_refused(refused):
    """An override cannot add a pool by a misspelt name either; the message stands at its line."""
    message = refused(BASE + "overrides:\n  more: {pools.clod.replicas_max: 3}\n")

    assert (
        message == "tiny.yaml:18: overrides.more.pools.clod.replicas_max: 3; pools has no 'clod'. Did you mean cloud?"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "tiny.yaml:1: null; must be a mapping of keys"),
        ("- 1\n", "tiny.yaml:1: [1]; must be a mapping of keys"),
        ("a: [1\nb: 2\n", "tiny.yaml:2: "),
        ("a: 1\n\tb: 2\n", "is not YAML"),
        ("a: 1\n---\na: 2\n", "is not YAML"),
        ("name: \x00\n", "is not YAML"),
        (f"a: {'[' * 5000}", "is nested too deeply to read"),
    ],
)
def test_what_is_no_yaml_mapping_is_refused_with_its_line(refused, text, message):
    """Syntax errors and files of the wrong kind are input errors with a line, never tracebacks."""
    assert message in refused(text)


# The traps of YAML


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001), ("1E5", 1e5), ("-.5", -0.5), ("3.", 3.0), ("+2", 2),
        ("010", 10), ("0o10", 8), ("0x1F", 31), ("1_000", "1_000"), ("12:30:00", "12:30:00"),
        ("no", "no"), ("on", "on"), ("Yes", "Yes"), ("y", "y"), ("off", "off"), ("true", True), ("False", False),
        ("null", None), ("~", None), ("", None), ("2026-01-01", "2026-01-01"), ("=", "="), ("5g", "5g"), ("1e", "1e"),
        ("'1e-3'", "1e-3"), ('"no"', "no"), ("'null'", "null"), ("'<<'", "<<"), ("1" * 301, 1e300 / 9 * 10),
    ],
)  # fmt: skip
def test_scalars_are_those_of_yaml_1_2(text, value):
    """PyYAML alone reads 1e-3 as text, no as false, 010 as 8 and 12:30:00 as a number; here they mean what they say."""
    read = load_yaml(f"key: {text}\n", "test")["key"]

    assert type(read) is type(value)
    assert read == (pytest.approx(value) if isinstance(value, float) else value)


@pytest.mark.parametrize("text", [".nan", ".NaN", ".inf", "-.Inf", "1e400", "9" * 400])
def test_nan_and_infinity_are_refused(text):
    """A number that is not finite is refused with its line, also one that only overflows."""
    with pytest.raises(
        InputError, match=r"^test:2: key: .*; must be a finite number\. Write null where there is no limit"
    ):
        load_yaml(f"# first\nkey: {text}\n", "test")


def test_a_duplicate_key_is_refused_with_both_lines():
    """PyYAML alone lets the second of two equal keys win in silence."""
    with pytest.raises(
        InputError, match=r"^test:3: a\.b: written twice; a key may stand once only\. First on line 2\.$"
    ):
        load_yaml("a:\n  b: 1\n  b: 2\n", "test")


def test_duplicates_count_however_they_are_written():
    """A quoted key is the same key."""
    with pytest.raises(InputError, match="test:1: a: written twice"):
        load_yaml("{a: 1, 'a': 2}", "test")


@pytest.mark.parametrize("key", ["1", "true", "null", "[a]", "1e3"])
def test_keys_that_are_not_text_are_refused(key):
    """JSON has text keys only, so that a number as a key would change its type on the way."""
    with pytest.raises(InputError, match=r"test:1: .*; keys must be text\. Put the key in quotes"):
        load_yaml(f"? {key}\n: 1\n", "test")


def test_tags_are_refused():
    """A tag could turn text into something else, or construct an object."""
    with pytest.raises(InputError, match=r"test:1: a: !!python/name:os\.system; tags are not read"):
        load_yaml("a: !!python/name:os.system x\n", "test")


def test_aliases_and_merge_keys_are_read():
    """An alias repeats a value; a merge key lays a mapping beneath the mapping's own keys."""
    data = load_yaml("a: &a {x: 1, y: [1]}\nb: *a\nc: {y: 2, <<: *a}\nd: {<<: [{x: 5}, *a]}\n", "test")

    assert data["b"] == {"x": 1, "y": [1]}
    assert data["c"] == {"x": 1, "y": 2}
    assert data["d"] == {"x": 5, "y": [1]}


BILLION = "\n".join(f"x{n}: &x{n} [{', '.join([f'*x{n - 1}' if n else '1'] * 10)}]" for n in range(10))


@pytest.mark.parametrize("text", ["a: &a [*a]\n", "a: &a {b: *a}\n", "&a a: 1\n<<: *a\n", BILLION])
def test_aliases_that_never_end_are_refused(text):
    """An alias of itself, or a small file that unfolds to billions of values, ends in an error and not in a hang."""
    with pytest.raises(InputError, match=r"^test:\d+: "):
        load_yaml(text, "test")


plain_data = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(plain_data)
def test_what_is_dumped_is_read_back_the_same(data):
    """Whatever plain data holds, text that looks like a number included, survives a round trip with its types."""
    assert json.dumps(load_yaml(dump_yaml(data), "test")) == json.dumps(data)


@given(
    st.sampled_from(["1e-3", "no", "010", "0o7", "1e5", "null", "~", "", ".nan", "<<", "- a", "a: b", "#x", " x", "1."])
)
def test_text_that_looks_like_something_else_is_dumped_quoted(text):
    """PyYAML alone writes the text 1e-3 without quotes, which YAML 1.2 reads as a number."""
    assert load_yaml(dump_yaml({text: text}), "test") == {text: text}


def test_tuples_and_mappings_are_dumped_as_lists_and_mappings(write):
    """What the program computes with can be written as it is; infinity cannot."""
    scenario = load_scenario(write(BASE))

    assert load_yaml(dump_yaml({"edge": scenario.edge, "degrees": (1, 2)}), "test")["degrees"] == [1, 2]
    with pytest.raises(ValueError, match="not JSON compliant"):
        dump_yaml(float("inf"))


@given(st.text(alphabet="ab:-[]{}&*!|>'\"#,? \n\t%@`0.e", max_size=60))
def test_any_text_is_read_or_refused(text):
    """The reader gives data or an input error for whatever it is fed, never another exception."""
    with suppress(InputError):
        json.dumps(load_yaml(text, "test"))


# The traps of the schema library


def nested_objects(data, path=()):
    """The dotted key of every object in plain data."""
    for key, value in data.items():
        if isinstance(value, dict):
            yield ".".join((*path, key))
            yield from nested_objects(value, (*path, key))


def test_an_unknown_key_is_refused_at_every_level(write):
    """No nested object drops what it does not know in silence."""
    scenario = load_scenario(write(BASE))
    objects = set(nested_objects(scenario.to_dict())) - {"requests", "edge", "pools", "search.options"}

    assert objects == {"requests.app", "requests.app.arrivals", "edge.phones", "pools.cloud", "budget", "search"}
    for place in objects:
        with pytest.raises(InputError, match="no such key"):
            scenario.with_overrides({f"{place}.zzz": 4})


def test_nothing_inside_a_scenario_can_be_changed(write):
    """Frozen means frozen all the way down: fields, entries and lists."""
    scenario = load_scenario(write(BASE + "search: {options: {asyncdiff: {stride: [1, 2]}}}\n"))

    with pytest.raises(ValidationError, match="frozen"):
        scenario.pools["cloud"].gpu = "t4"
    with pytest.raises(TypeError, match="item assignment"):
        scenario.pools["other"] = scenario.pools["cloud"]
    with pytest.raises(TypeError, match="item assignment"):
        scenario.search.options["asyncdiff"]["stride"] = (1,)
    assert scenario.search.options["asyncdiff"]["stride"] == (1, 2)
    with pytest.raises(TypeError, match="item assignment"):
        Scenario(**{**dict(scenario), "pools": {}}).pools["new"] = None


def test_a_copy_with_an_update_is_refused(write):
    """The model_copy of pydantic accepts -5 replicas as an update; ours sends its caller to with_overrides."""
    fleet = load_scenario(write(BASE)).edge["phones"]

    assert fleet.model_copy() == fleet
    with pytest.raises(TypeError, match="with_overrides"):
        fleet.model_copy(update={"replicas": -5})


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_infinity_passes_no_bound(value):
    """Infinity is above every lower bound and still refused, in Python as in a file."""
    with pytest.raises(ValidationError, match="finite number"):
        Pool(gpu="t4", replicas_max=1, cold_start_s=value)


def test_text_is_no_number_and_a_number_no_text():
    """Strict validation does not guess what was meant."""
    with pytest.raises(ValidationError, match="valid number"):
        Pool(gpu="t4", replicas_max=1, cold_start_s="1e-3")
    with pytest.raises(ValidationError, match="valid integer"):
        EdgeFleet(device="x", network="lte", replicas=True)


def test_a_class_called_all_is_refused_whatever_else_is_wrong(refused):
    """The summary's row over all classes has that name; the problem shows beside others, and in overrides too."""
    with_more = changed("horizon_s: 600", "horizon_s: -1", changed("  app:", "  all:"))
    data = load_yaml(BASE, "tiny")
    data["overrides"] = {"more": {"requests": {"all": data["requests"]["app"]}}}

    assert len(refused(with_more).splitlines()) == 2
    assert "requests.all: 'all'; " in refused(with_more)
    assert "requests.all: 'all'; " in refused(dump_yaml(data), scenario="more")


@pytest.mark.parametrize(
    ("written", "per_hour"),
    [
        ({}, 0.0),
        ({"purchase": "spot"}, SPOT_PREEMPTIONS_PER_NODE_HOUR),
        ({"purchase": "spot", "preemptions_per_node_hour": 0.0}, 0.0),
        ({"purchase": "on_demand", "preemptions_per_node_hour": 2.0}, 2.0),
    ],
)
def test_spot_nodes_are_taken_away_unless_the_scenario_knows_better(written, per_hour):
    """On demand never, on spot as often as assumed; a figure of one's own goes before both."""
    pool = Pool(gpu="t4", replicas_max=1, replacement_s=360.0, **written)

    assert pool.preemptions_per_s == pytest.approx(per_hour / 3600)
    assert pool.availability == pytest.approx(1.0 if not per_hour else (1 / per_hour) / (1 / per_hour + 0.1))


def test_rules_between_fields_hold_for_objects_made_in_python():
    """Whoever builds a pool without a file is told what is wrong too."""
    with pytest.raises(ValidationError, match="replicas_min is 3, must not exceed replicas_max, which is 1"):
        Pool(gpu="t4", replicas_min=3, replicas_max=1)


# The JSON Schema, and what is shipped


def test_the_shipped_schema_is_up_to_date():
    """`scenario.schema.json` is what the models say; the message tells how to write it again."""
    shipped = (FOLDER / "scenario.schema.json").read_text()
    remedy = "json.dumps(scenario_schema(), indent=2) + newline is its content"

    assert shipped == json.dumps(scenario_schema(), indent=2) + "\n", remedy


def test_the_schema_describes_every_key():
    """Every key has a sentence for the editor to show, and unknown keys are marked."""
    schema = scenario_schema()
    objects = [schema, *schema["$defs"].values()]

    assert {"overrides", "scenarios", "horizon_s"} <= schema["properties"].keys()
    assert "overrides_applied" not in schema["properties"]
    for item in objects:
        assert item["additionalProperties"] is False
        assert all("description" in value for value in item["properties"].values())


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_scenario_and_its_variants_resolve(name):
    """Every shipped file loads, alone and under each of its scenarios and overrides."""
    text = (FOLDER / f"{name}.yaml").read_text()
    data = load_yaml(text, name)

    assert text.startswith("# yaml-language-server: $schema=scenario.schema.json\n")
    assert re.search(r"^horizon_s: \d+", text, re.MULTILINE)
    assert load_scenario(name).name == name
    for variant in (*data["overrides"], *data["scenarios"]):
        assert load_scenario(name, scenario=variant).overrides_applied


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_scenario_resolves_to_itself(name, tmp_path):
    """The resolved form of a shipped scenario is a scenario, and the same one."""
    scenario = load_scenario(name)
    (tmp_path / "resolved.yaml").write_text(dump_yaml(scenario.to_dict()), encoding="utf-8")

    assert load_scenario(tmp_path / "resolved.yaml") == scenario


def test_photo_app_has_the_traffic_and_the_phones_it_promises():
    """At least one request a second, from old phones and new, on three kinds of network."""
    scenario = load_scenario("photo-app")

    assert sum(spec.arrivals.rate_per_s for spec in scenario.requests.values()) >= 1.0
    assert {fleet.network for fleet in scenario.edge.values()} == {"lte", "5g", "wifi5"}
    assert {"snapdragon-8-elite", "iphone-12-pro-max"} <= {fleet.device for fleet in scenario.edge.values()}
    assert load_scenario("photo-app", scenario="peak").requests["gen3"].arrivals.rate_per_s == 6.0


def test_gentd26_takes_the_path_of_the_real_trace():
    """Without the file the generator stands in; `--set` names the file."""
    assert load_scenario("gentd26").requests["api"].arrivals.path is None
    call = {"requests.api.arrivals.path": "/data/lora_request_trace.csv"}
    assert load_scenario("gentd26", overrides=call).requests["api"].arrivals.path == "/data/lora_request_trace.csv"
