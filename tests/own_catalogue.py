"""A profiles folder with small models of its own, as a user would make one: the executors' tests run these in full."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

from hybridsd_sim.files import data_folder
from small_models import SMALL, SMALLER

WIDTH = 768
"""The width of CLIP-L's embeddings, so that the small models go with a real text encoder."""
MODELS = {"small": SMALL | {"cross_attention_dim": WIDTH}, "smaller": SMALLER | {"cross_attention_dim": WIDTH}}


def own_catalogue(folder: Path) -> Path:
    """The shipped catalogue with the small models in it, in `folder`."""
    shutil.copytree(data_folder("profiles") / "catalog", folder / "catalog")
    path = folder / "catalog" / "models.csv"
    rows = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
    sd15 = next(row for row in rows if row["name"] == "sd15")
    rows += [
        sd15 | {"name": name, "label": name, "native_px": "64", "config": json.dumps(config), "vae": "taesd"}
        for name, config in MODELS.items()
    ]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(sd15), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return folder
