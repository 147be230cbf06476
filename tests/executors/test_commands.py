from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from PIL import Image

from executors.cli import main
from executors.profiling import ProfileResult
from executors.profiling.grid import ProfileTarget
from hybridsd_sim.errors import Problem
from own_catalogue import own_catalogue

STEPS = ["--num-inference-steps", "4", "--height-px", "64", "--threads", "1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A profiles folder with small models."""
    return own_catalogue(tmp_path_factory.mktemp("profiles") / "own")


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs a command in this process: its exit code, standard output and standard error."""
    threads = torch.get_num_threads()

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["executors", *map(str, arguments)])
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        return code, *capsys.readouterr()

    yield run
    torch.set_num_threads(threads)


@contextmanager
def process(*arguments):
    """A command in a process of its own, killed at the end whatever happens."""
    said = [sys.executable, "-m", "executors", *map(str, arguments)]
    with subprocess.Popen(said, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as running:
        try:
            yield running
        finally:
            running.kill()


# ---- count ----------------------------------------------------------------------------------------------------------


def test_count_prints_json_alone(command) -> None:
    """`count` gives SD 1.5's published parameters and FLOPs as one JSON document on standard output."""
    code, out, err = command("count", "--models", "sd15", "--sizes", "512,512x768", "--format", "json")
    rows = json.loads(out)["rows"]
    assert (code, err) == (0, "")
    assert [(row["height_px"], row["width_px"]) for row in rows] == [(512, 512), (512, 768)]
    assert rows[0]["params"] == 859_520_964
    assert rows[0]["flop"] == pytest.approx(803.3e9, rel=1e-3)


def test_count_prints_a_column_for_each_model_and_size(command) -> None:
    """As text, every figure is a line with its name first."""
    code, out, _ = command("count", "--models", "sd15,bk-sdm-tiny", "--sizes", "512")
    lines = dict(line.split(maxsplit=1) for line in out.splitlines()[1:])
    assert code == 0
    assert lines["params"].split() == ["859520964", "323384964"]


def test_count_shows_what_pcpp_saves_by_sending_the_used_part(command) -> None:
    """With `--degrees`, bytes a step: whole stripes as the public code sends them, and the part that is used."""
    code, out, _ = command("count", "--models", "sdxl", "--sizes", "1024", "--degrees", "4,8", "--format", "json")
    four, eight = json.loads(out)["rows"]
    assert (code, four["degree"], eight["degree"]) == (0, 4, 8)
    assert four["pcpp_used_part_bytes"] < four["pcpp_whole_stripes_bytes"] < four["distrifusion_bytes"]


def test_count_counts_components_too(command, profiles) -> None:
    """VAE decoders and text encoders by name: parameters, operations and FLOPs, as the catalogue has them."""
    code, out, _ = command("count", "--models", "autoencoder-kl,clip-l", "--format", "json")
    rows = {row["name"]: row for row in json.loads(out)["rows"]}
    assert code == 0
    for name in ("autoencoder-kl", "clip-l"):
        known = profiles.component(name)
        assert (rows[name]["params"], rows[name]["ops"]) == (known.params, known.ops)
        assert rows[name]["flop"] == pytest.approx(known.flop(512, 512), rel=1e-3)
    code, out, _ = command("count", "--models", "autoencoder-kl,clip-l")
    lines = dict(line.split(maxsplit=1) for line in out.splitlines()[1:])
    assert lines["params"].split() == [str(rows[name]["params"]) for name in ("autoencoder-kl", "clip-l")]


@pytest.mark.parametrize("what", [["count"], ["profile", "--out", "nowhere"]])
def test_no_model_is_no_order(command, what) -> None:
    """An empty list would do nothing and look like success."""
    code, out, err = command(*what, "--models", "")
    assert (code, out) == (2, "")
    assert err.startswith("error: --models: ''; names no model")


def test_models_and_components_are_not_counted_together(command) -> None:
    """They have other figures, so a table has one or the other."""
    code, out, err = command("count", "--models", "sd15,clip-l")
    assert (code, out) == (2, "")
    assert "--models: sd15 with components; clip-l" in err


# ---- profile --------------------------------------------------------------------------------------------------------


def test_profile_prints_json_alone_and_progress_elsewhere(command, folder, tmp_path) -> None:
    """Standard output is one JSON document; what is being measured and what was refused goes to standard error."""
    code, out, err = command(
        "profile", "--models", "small", "--sizes", "64", "--methods", "single,cfg_parallel", "--degrees", "1,2,4",
        "--ranks", "loopback", "--device", "cpu-1core", "--threads", "1", "--profiles", folder,
        "--out", tmp_path, "--format", "json",
    )  # fmt: skip
    data = json.loads(out)
    assert code == 0
    assert data["rows_written"] == 3
    assert [entry["degree"] for entry in data["measured"]] == [1, 2]
    assert all(entry["seconds_median"] > 0 and entry["share_of_ceiling"] > 0 for entry in data["measured"])
    assert "small step 64x64 guided" in err
    assert "cfg_parallel x4" in err
    assert str(tmp_path / "measured" / "cpu-1core" / "small.csv") in data["files"]


def test_a_target_that_failed_ends_the_profile_with_code_1(command, folder, tmp_path, monkeypatch) -> None:
    """The rest is measured and the summary printed; the exit code says that something is missing."""

    def measure(sweep, catalogue, here, out, **settings):
        target = ProfileTarget(model="small", table="small", components=("step",), flop={})
        return ProfileResult(here, failed=[target], refused=[Problem("small step", "256 px", "out of memory")])

    monkeypatch.setattr("executors.profiling.profile", measure)
    asked = ["profile", "--models", "small", "--device", "cpu-1core", "--threads", "1", "--profiles", folder]
    code, out, err = command(*asked, "--out", tmp_path, "--format", "json")
    assert code == 1
    assert len(json.loads(out)["failed"]) == 1
    assert "not measured: small step: 256 px; out of memory" in err


def test_an_interrupted_profile_says_how_to_go_on(folder, tmp_path) -> None:
    """Ctrl-C ends with code 130 and leaves the rows of everything that was measured before."""
    out = tmp_path / "out"
    with process(
        "profile", "--models", "small,sd15", "--sizes", "256", "--device", "cpu-1core", "--threads", "1",
        "--profiles", folder, "--out", out,
    ) as running:  # fmt: skip
        while "sd15" not in running.stderr.readline():
            assert running.poll() is None
        running.send_signal(signal.SIGINT)
        _, err = running.communicate(timeout=60)
    assert running.returncode == 130
    assert "run it again" in err
    assert sorted(path.name for path in out.rglob("*.*")) == ["small.csv", "small.meta.yaml"]


# ---- live ----------------------------------------------------------------------------------------------------------


def test_a_service_that_is_not_there_is_told_once(tmp_path) -> None:
    """Attempts that are made again are no messages: standard error has the error alone."""
    asked = ["--request-class", "picture", "--out", tmp_path / "image.png"]
    with process("live", "--ask", "http://127.0.0.1:9", *asked) as running:
        out, err = running.communicate(timeout=60)
    assert (running.returncode, out, err) == (1, "", "error: no image: unreachable\n")


# ---- run ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def image(command, folder, tmp_path):
    """Makes an image and returns its bytes and what the command said about it."""

    def make(*arguments):
        path = tmp_path / "image.png"
        code, out, err = command(
            "run", "--profiles", folder, "--out", path, "--format", "json", *STEPS, *arguments
        )  # fmt: skip
        assert code == 0, err
        with Image.open(path) as picture:
            assert (picture.format, picture.size) == ("PNG", (64, 64))
        return path.read_bytes(), json.loads(out)

    return make


def test_run_makes_an_image_and_times_its_parts(image) -> None:
    """One image is a PNG of the size asked for; text encoder, denoising and VAE have their seconds."""
    _, said = image("--model", "small")
    assert set(said["seconds"]) == {"load", "text_encode", "denoise", "vae_decode"}
    assert min(said["seconds"].values()) > 0
    assert said["bytes"] == {"received_by_busiest_rank": 0}


def test_the_same_model_after_the_switch_paints_the_same_image(image) -> None:
    """With both models equal, the switch leaves no trace, whatever the sampler; another seed paints another image."""
    one = ["--model", "small", "--sampler", "dpmsolver++"]
    alone, _ = image(*one)
    switched, said = image(*one, "--small-model", "small", "--switch-step", "2")
    assert switched == alone
    assert said["seconds"]["denoise_small"] > 0
    assert image(*one, "--seed", "1")[0] != alone


def test_an_edge_in_another_process_paints_the_same_image(image, folder) -> None:
    """The cloud's stage on two ranks, then TCP, then the edge's stage: the same bytes as all of it in one process."""
    stage = ["--model", "small", "--switch-step", "2", "--method", "distrifusion", "--degree", "2"]
    here, _ = image(*stage, "--small-model", "smaller")
    with process(
        "run", "--model", "smaller", "--profiles", folder, "--threads", "1", "--listen", "127.0.0.1:0"
    ) as edge:
        line = edge.stderr.readline()
        assert line.startswith("listening on 127.0.0.1:"), line
        there, said = image(*stage, "--edge", line.split()[-1])
        edge.send_signal(signal.SIGINT)
        assert edge.wait(timeout=30) == 0
    assert there == here
    assert said["bytes"]["handover"] > 4 * 2 * 77 * 768
    assert said["bytes"]["received_by_busiest_rank"] > 0


def test_options_are_read_as_predictions_read_them(image, command, folder) -> None:
    """`False` is false and `True` is true: the one is what the executors do anyway, the other what they refuse."""
    arguments = ["--model", "small", "--method", "asyncdiff", "--degree", "2", "--option"]
    assert image(*arguments, "public_cut=False")[0] == image(*arguments, "public_cut=false")[0]
    code, _, err = command("run", "--profiles", folder, "--out", "image.png", *STEPS, *arguments, "public_cut=True")
    assert code == 2
    assert err.startswith("error: --option public_cut: true; the executors cut AsyncDiff's components")


@pytest.mark.parametrize(
    ("method", "option", "message"),
    [
        ("asyncdiff", "public_cut=maybe", "--option public_cut: maybe; must be true or false. "),
        ("asyncdiff", "stride=3", "--option stride: 3; AsyncDiff has stride 1 or 2"),
        ("pcpp", "public_cut=true", "--option: 'public_cut'; pcpp has no such option. "),
        ("cfg_parallel", "public_cut=true", "--option: public_cut=true; cfg_parallel has no options. "),
    ],
)
def test_an_option_is_refused_once(command, folder, method, option, message) -> None:
    """What the method does not have or cannot read is its own rule's to refuse; nothing else is said of the option."""
    arguments = ["--model", "small", "--method", method, "--degree", "2", "--option", option]
    code, _, err = command("run", "--profiles", folder, "--out", "image.png", *STEPS, *arguments)
    assert code == 2
    assert err.startswith(f"error: {message}")
    assert err.count("error: ") == 1


PARALLEL = ["--model", "small", "--method", "distrifusion", "--degree", "2", "--option", "warmup_steps=1"]


def test_ranks_in_processes_paint_what_ranks_in_turn_do(image) -> None:
    """Two processes over gloo: the same bytes as one process with a rank after the other, and the same traffic."""
    in_turn, here = image(*PARALLEL)
    over_gloo, there = image(*PARALLEL, "--ranks", "process")
    assert over_gloo == in_turn
    assert (here["ranks"], there["ranks"]) == ("loopback", "gloo")
    assert there["bytes"] == here["bytes"]


def test_ranks_of_torchrun_paint_what_ranks_in_turn_do(image, folder, tmp_path) -> None:
    """Under torchrun, whose processes are the ranks: one file, one document on standard output, the same bytes."""
    in_turn, _ = image(*PARALLEL)
    path = tmp_path / "torchrun.png"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2"]
    asked = [
        "run",
        *PARALLEL,
        "--ranks",
        "process",
        "--profiles",
        folder,
        "--out",
        path,
        "--format",
        "json",
        *STEPS,
    ]
    said = subprocess.run(
        [sys.executable, *torchrun, "-m", "executors", *map(str, asked)],
        capture_output=True, text=True, check=False, timeout=300, env=os.environ | {"GLOO_SOCKET_IFNAME": "lo"},
    )  # fmt: skip
    assert said.returncode == 0, said.stderr
    assert path.read_bytes() == in_turn
    assert json.loads(said.stdout)["ranks"] == "gloo"


def test_a_silent_edge_is_given_up_after_the_time_allowed(command, folder, tmp_path) -> None:
    """`--timeout-s` is how long the other side may say nothing."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        code, _, err = command(
            "run", "--model", "small", "--switch-step", "0", "--edge", address, "--timeout-s", "0.5",
            "--profiles", folder, "--out", tmp_path / "image.png", *STEPS,
        )  # fmt: skip
    assert code == 1
    assert "silent or too slow for 0.5 s" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "small", "--height-px", "0"], "--height-px: 0; an image has at least one row"),
        (["--model", "small", "--width-px", "-64"], "--width-px: -64"),
        (["--model", "small", "--guidance-scale", "nan"], "--guidance-scale: nan; must be a finite number"),
        (["--model", "small", "--guidance-scale", "inf"], "--guidance-scale: inf"),
        (["--model", "small", "--timeout-s", "0"], "--timeout-s: 0.0; must be above 0"),
        (["--model", "small", "--timeout-s", "nan"], "--timeout-s: nan"),
        (["--model", "small", "--timeout-s", "inf"], "--timeout-s: inf"),
        (["--model", "small", "--edge", "a..b:80"], "--edge: a..b:80; the host is not known here"),
        (["--model", "small", "--listen", "192.0.2.1:0"], "--listen: 192.0.2.1:0; this machine cannot listen there"),
        (["--model", "smal"], "'smal'"),
        (["--model", "small", "--switch-step", "2"], "--small-model or --edge"),
        (["--model", "small", "--small-model", "smaller"], "--switch-step"),
        (["--model", "small", "--small-model", "smaller", "--switch-step", "9"], "0 to 4"),
        (["--model", "small", "--small-model", "koala-700m", "--switch-step", "2"], "latent space is sdxl"),
        (["--model", "small", "--edge", "nowhere"], "HOST:PORT"),
        (["--model", "small", "--option", "stride"], "KEY=VALUE"),
        (["--model", "small", "--precision", "fp8"], "'fp8'"),
        (["--model", "small", "--sampler", "plms"], "'plms'"),
        (["--model", "small", "--method", "distrifusion", "--degree", "3"], "do not divide by 3"),
        (["--model", "small", "--weights", "no-such-folder"], "no-such-folder"),
        (["--model", "small", "--out", "image.jpg"], ".png"),
    ],
)
def test_wrong_input_stops_with_a_message_and_code_2(command, folder, tmp_path, arguments, message) -> None:
    """Place, value, rule and remedy go to standard error, nothing to standard output, and no file is made."""
    path = tmp_path / "image.png"
    code, out, err = command("run", "--profiles", folder, "--out", path, *STEPS, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert message in err
    assert "Traceback" not in err
    assert not path.exists()


def test_an_edge_that_is_not_there_stops_the_run_with_code_1(command, folder, tmp_path) -> None:
    """A run that began and cannot finish says whom it did not reach."""
    arguments = ["--model", "small", "--switch-step", "0", "--edge", "127.0.0.1:9"]
    code, out, err = command("run", "--profiles", folder, "--out", tmp_path / "image.png", *STEPS, *arguments)
    assert (code, out) == (1, "")
    assert "127.0.0.1:9" in err


@pytest.mark.parametrize("size", ["5l2", "512x512x3", "x"])
def test_a_size_that_is_none_is_refused(command, size) -> None:
    """Sizes are one number, or two with an x between them."""
    code, _, err = command("count", "--models", "sd15", "--sizes", size)
    assert code == 2
    assert "--sizes" in err


def test_debug_shows_where_it_happened(command) -> None:
    """With --debug the traceback comes before the message."""
    code, _, err = command("count", "--models", "no-such-model", "--debug")
    assert code == 2
    assert err.index("Traceback") < err.index("error: ")
