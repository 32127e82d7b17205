"""Databricks-Dolly-15k: instructions and answers in 8 categories, from the data root or else the hub.

Conover et al., "Free Dolly", 2023. It has no test split; of rows that stand in it more than once the first is kept, so
that none is trained on and tested on.
"""

from typing import TYPE_CHECKING

import numpy as np

from fedtalora_flwr.data.hf_load import load_files, load_hub
from fedtalora_flwr.data.hf_rows import source_from_splits
from fedtalora_flwr.data.locate import known_folder, where_to_put
from fedtalora_flwr.data.source import DataError, Source

if TYPE_CHECKING:
    from datasets import Dataset

_FOLDER, _HUB = "dolly", "databricks/databricks-dolly-15k"


def create(*, data_root: str) -> Source:
    """Read Dolly; a class is a category.

    Parameters
    ----------
    data_root
        Folder that holds ``dolly`` with ``dolly.parquet``; empty: the environment's ``FEDTALORA_DATA``.

    Raises
    ------
    DataError
        If the folder is not there and the hub cannot be reached, or the file is missing or broken.
    """
    folder = known_folder(_FOLDER, data_root=data_root)
    if folder is None:
        try:
            rows, name = load_hub(_HUB)["train"], _HUB
        except DataError as error:
            raise DataError(f"{error}; or {where_to_put(_FOLDER, data_root=data_root)}") from error
    else:
        rows, name = load_files([folder / "dolly.parquet"]), str(folder)
    return source_from_splits(
        name, {"train": _once(rows)}, input_column="", label_column="category", answer_column="response"
    )


def _once(rows: "Dataset") -> "Dataset":
    """Keep the first of rows that say the same."""
    columns = [rows[name] for name in ("instruction", "context", "response")]
    first: dict[tuple[str, ...], int] = {}
    for row, said in enumerate(zip(*columns, strict=True)):
        first.setdefault(said, row)
    return rows.select(np.fromiter(first.values(), dtype=np.int64))
