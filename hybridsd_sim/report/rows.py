"""`requests.parquet`: a row per request of every run, written block by block and read back for the timeline."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hybridsd_sim.records import COLUMNS, STATUS_NAMES, WHOLE, Records, column

if TYPE_CHECKING:
    from hybridsd_sim.simulate import SimResult

BLOCK_ROWS = 32768
"""Requests written at a time."""


def write_rows(path: Path, runs: Mapping[str, SimResult]) -> None:
    """Write the requests of every run, in order of run, replication and arrival; a million need little memory."""
    writer = None
    try:
        for name, result in runs.items():
            for records in result.replications:
                for first in range(0, max(1, len(records)), BLOCK_ROWS):
                    table = _table(records, records.rows()[first : first + BLOCK_ROWS], name)
                    writer = writer or pq.ParquetWriter(path, table.schema, **_encoding(table.schema))
                    writer.write_table(table)
    finally:
        if writer is not None:
            writer.close()


def _encoding(schema: Any) -> dict[str, Any]:
    """Times compress best with their bytes sorted by significance, names as dictionaries."""
    times = [field.name for field in schema if pa.types.is_floating(field.type)]
    names = [field.name for field in schema if not pa.types.is_floating(field.type)]
    return {"compression": "zstd", "use_dictionary": names, "use_byte_stream_split": times}


def _table(records: Records, rows: np.ndarray, policy: str) -> Any:
    """A block of a replication: names for indexes, whole numbers for counts, the meaning of each column beside it."""
    same = {"policy": pa.array([policy], pa.string()), "replication": pa.array([records.replication], pa.int64())}
    columns = {name: pa.chunked_array([value.take(np.zeros(len(rows), np.int64))]) for name, value in same.items()}
    fields = [pa.field(name, value.type) for name, value in columns.items()]
    names = _names(records)
    for name, meaning in COLUMNS:
        values = column(rows, name)
        label, known = names.get(name, (name, ()))
        plain = pa.array(values.astype(np.int64) if name in WHOLE else values)
        columns[label] = _named(values, known) if name in names else plain
        fields.append(pa.field(label, columns[label].type, metadata={"meaning": meaning}))
    return pa.table(columns, schema=pa.schema(fields))


def _names(records: Records) -> dict[str, tuple[str, Sequence[str]]]:
    """Columns of indexes: the name of the column of names, and the names."""
    return {
        "class_index": ("request_class", records.classes),
        "plan_index": ("plan", records.plans),
        "status": ("status", STATUS_NAMES),
        "reason": ("reason", records.reasons),
        "pool_index": ("pool", records.pools),
        "fleet_index": ("fleet", records.fleets),
    }


def _named(values: np.ndarray, names: Sequence[str]) -> Any:
    """Names for indexes, null for -1. Two plans may have one name, which is why this is no pandas category."""
    codes = values.astype(np.int32)
    return pa.DictionaryArray.from_arrays(pa.array(codes, mask=codes < 0), pa.array(list(names), pa.string())).cast(
        pa.string()
    )


def first_rows(path: Path, most: int) -> list[dict[str, Any]]:
    """The first requests of the first replication of the first run, as mappings; NaN for times that do not apply."""
    batch = next(pq.ParquetFile(path).iter_batches(batch_size=most), None)
    rows: list[dict[str, Any]] = [] if batch is None else batch.to_pylist()
    mine = [row for row in rows if (row["policy"], row["replication"]) == (rows[0]["policy"], rows[0]["replication"])]
    return [{key: math.nan if v is None and key.endswith("_s") else v for key, v in row.items()} for row in mine]
