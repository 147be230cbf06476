from __future__ import annotations

import csv
import json
import math
from datetime import datetime

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hybridsd_sim.errors import InputError
from hybridsd_sim.workload import describe_trace, import_trace
from hybridsd_sim.workload.traces import MAX_PROBLEMS

GENTD26_HEADER = (
    "gmt_create,predict_type,predict_status,exec_time_seconds,groupId,prompt_length,negative_prompt_length,"
    "num_images_per_prompt,num_inference_steps,checkpoint_model_version_id,num_lora"
)
GENTD26_ROWS = (  # invented
    "2031-03-04 09:50:00,TXT_2_IMG,SUCCEED,32.0,U1,63.0,26.0,1.0,30.0,M1,0",
    "2031-03-04 10:01:30,TXT_2_IMG,FAILED,36.0,U2,93.0,,8.0,40.0,M7,2",
    "2031-03-04 10:00:00,IMG_2_IMG,SUCCEED,43.0,U2,93.0,,1.0,40.0,M7,0",
    "2031-03-04 10:01:30,TXT_2_IMG,PENDING,0.0,U3,,,,,,0",
)
LAYOUTS = {
    "Alibaba GenTD26 requests": "\n".join([GENTD26_HEADER, *GENTD26_ROWS]),
    "Azure LLM inference": "TIMESTAMP,ContextTokens,GeneratedTokens\n2031-03-04 18:17:03.9799600,480,10\n"
    "2031-03-04 18:17:04.0319600,31,8",
    "Mooncake": "timestamp_ms,input_length,output_length,n_hash_blocks\n0,675,50,1\n3000,732,49,2",
    "plain": "arrival_s\n5\n7.5\n",
}


def written(folder, text, name="trace.csv"):
    """A file with this text."""
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def problems_of(call):
    """The problems of the `InputError` that a call raises, as text."""
    with pytest.raises(InputError) as caught:
        call()
    return [str(problem) for problem in caught.value.problems]


# --- reading traces


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_the_four_layouts_are_recognised(tmp_path, layout, ending):
    """Each known layout is told by its header, with any line ending and with a byte-order mark."""
    path = tmp_path / "trace.csv"
    path.write_bytes(b"\xef\xbb\xbf" + LAYOUTS[layout].replace("\n", ending).encode())
    trace = import_trace(path)
    assert trace.layout == layout
    assert len(trace) == (4 if "GenTD26" in layout else 2)
    assert trace.arrival_s[0] == 0.0
    assert (np.diff(trace.arrival_s) > 0).sum() >= 1


def test_an_imported_request_keeps_what_was_said(tmp_path):
    """Rows come in order of arrival; failed requests are kept with their status; what is not said stays unsaid."""
    trace = import_trace(written(tmp_path, LAYOUTS["Alibaba GenTD26 requests"]))
    assert trace.start == datetime(2031, 3, 4, 9, 50)  # noqa: DTZ001 -- the trace tells no zone
    assert trace.status.tolist() == ["SUCCEED", "SUCCEED", "FAILED", "PENDING"]
    assert trace.num_lora.tolist() == [0, 0, 2, 0]
    assert trace.num_images.tolist() == [1, 1, 8, 0]
    assert trace.base_model.tolist() == ["M1", "M7", "M7", ""]
    assert trace.user.tolist() == ["U1", "U2", "U2", "U3"]
    assert trace.execution_s.tolist() == [32.0, 43.0, 36.0, 0.0]


def test_bad_rows_are_told_together(tmp_path):
    """Every bad value is named with file, line, column and rule, good rows or not."""
    rows = ["arrival_s,num_images,execution_s", "0,1,2", "soon,1,2", "1,2.5,2", "2,1", "nan,0,-1", "", "4,65,inf"]
    path = written(tmp_path, "\n".join(rows))
    found = problems_of(lambda: import_trace(path))
    places = [text.removeprefix(f"{path}:").split(";", maxsplit=1)[0] for text in found]
    assert places == [
        "3: arrival_s: 'soon'",
        "4: num_images: '2.5'",
        "5: 2 cells",
        "6: arrival_s: 'nan'",
        "6: num_images: '0'",
        "6: execution_s: '-1'",
        "8: num_images: '65'",
        "8: execution_s: 'inf'",
    ]


def test_many_bad_rows_are_counted(tmp_path):
    """The first twenty problems are listed and the others counted."""
    found = problems_of(lambda: import_trace(written(tmp_path, "arrival_s\n" + "x\n" * 50)))
    assert len(found) == MAX_PROBLEMS + 1
    assert "30 more problems" in found[-1]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "an empty file"),
        ("when,what\n1,2\n", "no known trace has these columns. Expected Alibaba GenTD26 requests: gmt_create"),
        ("arrival_s\n", "a trace needs at least one request"),
        ("arrival_s,arrival_s\n1,2\n", "a column may stand once only"),
        ("arrival_s,user\n1,\0\n" + '"' + "x" * 200_000 + '",y\n', "CSV"),
    ],
)
def test_a_file_that_is_no_trace_is_refused(tmp_path, text, said):
    """A file without a known header, without rows, or that is not CSV is an input error that says so."""
    assert said in "\n".join(problems_of(lambda: import_trace(written(tmp_path, text))))


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    """A missing file, a folder and binary data are input errors that name the path."""
    (tmp_path / "binary").write_bytes(b"arrival_s\n\xff\xfe\n")
    for name in ("missing.csv", ".", "binary"):
        assert str(tmp_path / name) in problems_of(lambda name=name: import_trace(tmp_path / name))[0]


# --- writing traces


TEXT = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), max_size=8)
SAID = {
    "arrival_s": st.floats(0, 1e6),
    "num_inference_steps": st.one_of(st.just(""), st.integers(1, 1000)),
    "num_images": st.one_of(st.just(""), st.integers(1, 64)),
    "num_lora": st.one_of(st.just(""), st.integers(0, 9)),
    "base_model": TEXT,
    "status": TEXT,
    "execution_s": st.one_of(st.just(""), st.floats(0, 1e6)),
}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.fixed_dictionaries(SAID), min_size=1, max_size=6), st.booleans())
def test_a_written_trace_reads_back_the_same(tmp_path, rows, dated):
    """Importing what `write_csv` wrote gives every value again, to the last digit, and the same description."""
    stamp = ["timestamp"] if dated else []
    with (tmp_path / "in.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*SAID, *stamp])
        writer.writerows([*(row[name] for name in SAID), *("2031-03-04 09:50:00" for _ in stamp)] for row in rows)
    first = import_trace(tmp_path / "in.csv")
    first.write_csv(tmp_path / "out.csv")
    second = import_trace(tmp_path / "out.csv")
    assert second.start == first.start
    for name in SAID:
        assert np.array_equal(getattr(first, name), getattr(second, name), equal_nan=name == "execution_s")
    assert second.summary() == first.summary()


class FullDisk:
    """A CSV writer that gets as far as the header; then the disk is full."""

    def __init__(self, file, **_):
        self.writerow = lambda _: file.write("half")

    def writerows(self, rows):
        """Break off."""
        raise OSError(28, "No space left on device")


def test_a_trace_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    """When writing breaks off, the old file stands untouched and nothing else is left behind."""
    out = written(tmp_path, "precious", "out.csv")
    trace = import_trace(written(tmp_path, LAYOUTS["plain"]))
    monkeypatch.setattr(csv, "writer", FullDisk)
    problems_of(lambda: trace.write_csv(out))
    assert out.read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.csv", "trace.csv"]


def test_a_trace_needs_a_folder_to_be_written_to(tmp_path):
    """A path whose folder does not exist, or is a file, is an input error."""
    trace = import_trace(written(tmp_path, LAYOUTS["plain"]))
    for out in (tmp_path / "no" / "out.csv", tmp_path / "trace.csv" / "out.csv", tmp_path):
        assert "cannot be written" in problems_of(lambda out=out: trace.write_csv(out))[0]


# --- describing traces


def test_a_description_is_arithmetic(tmp_path):
    """Figures of a trace small enough to check by hand."""
    rows = ["0,A,30,1,0", "10,B,30,1,1", "20,B,30,4,0", "30,A,40,1,0", "4030,A,30,1,0"]
    path = written(tmp_path, "\n".join(["arrival_s,base_model,num_inference_steps,num_images,num_lora", *rows]))
    summary = describe_trace(path)
    assert (summary.requests, summary.span_s, summary.rate_per_s) == (5, 4030.0, 4 / 4030)
    assert (summary.gap_mean_s, summary.gap_median_s, summary.long_gaps) == (1007.5, 10.0, 1)
    assert summary.gap_cv == pytest.approx(math.sqrt(3 * 997.5**2 + 2992.5**2) / 2 / 1007.5)
    assert (summary.gap_mean_short_s, summary.gap_cv_short) == (10.0, 0.0)
    assert (summary.busy_hours, summary.peak_hour_requests, summary.peak_to_mean_busy_hour) == (2, 4, 1.6)
    assert summary.num_inference_steps == {"30": 0.8, "40": 0.2}
    assert summary.num_images == {"1": 0.8, "4": 0.2}
    assert (summary.lora_share, summary.base_models, summary.base_model_switch_share) == (0.2, 2, 0.5)
    assert summary.base_model_top_share == {"1": 0.6, "5": 1.0, "10": 1.0}
    assert summary.execution_s == {}
    assert json.loads(json.dumps(summary.to_dict()))["requests"] == 5


@pytest.mark.parametrize("text", ["arrival_s\n4\n", "arrival_s\n4\n4\n"])
def test_what_cannot_be_said_is_none(tmp_path, text):
    """A single request, or several at once, has no rate; a trace without models has no model shares."""
    summary = describe_trace(written(tmp_path, text))
    assert (summary.rate_per_s, summary.gap_cv, summary.base_model_switch_share) == (None, None, None)
    assert summary.base_model_top_share == {}
