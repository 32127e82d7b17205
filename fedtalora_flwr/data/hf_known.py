"""Data sets that are known by name: tables below the data root, else the hub's."""

from fedtalora_flwr.data.hf_load import load_files, load_hub
from fedtalora_flwr.data.hf_rows import source_from_splits
from fedtalora_flwr.data.locate import known_folder, named_files, where_to_put
from fedtalora_flwr.data.source import DataError, Source


def known_source(folder: str, *, hub: str, data_root: str, config: str | None = None) -> Source:
    """Read a data set that has a place of its own.

    Parameters
    ----------
    folder
        Below the data root; it holds Parquet files whose names begin with ``train``, and with ``test``, ``dev`` or
        ``val``. The first of these three whose labels are there is the test split.
    hub, config
        What to load where there is no such folder, and which of its configurations.
    data_root
        Empty: the environment's ``FEDTALORA_DATA``.

    Raises
    ------
    DataError
        If the folder is not there and the hub cannot be reached, or a file is missing or broken.
    """
    found = known_folder(folder, data_root=data_root)
    if found is not None:
        files = {kind: named_files(kind, found, [".parquet"]) for kind in ("train", "test", "dev", "val")}
        if files["dev"]:
            del files["val"]  # a part of the published training data, where there is a published development set
        splits = {kind: load_files(paths) for kind, paths in files.items() if paths}
        return source_from_splits(str(found), splits, input_column="", label_column="")
    try:
        from_hub = load_hub(hub, config=config)
    except DataError as error:
        raise DataError(f"{error}; or {where_to_put(folder, data_root=data_root)}") from error
    return source_from_splits(hub, from_hub, input_column="", label_column="")
