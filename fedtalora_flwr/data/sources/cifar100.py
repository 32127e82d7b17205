"""CIFAR-100: 32x32 images of 100 classes, from the data root or else the hub.

Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
"""

from fedtalora_flwr.data.hf_load import load_files, load_hub
from fedtalora_flwr.data.hf_rows import source_from_splits
from fedtalora_flwr.data.locate import known_folder, split_files, where_to_put
from fedtalora_flwr.data.source import DataError, Source

_FOLDER, _HUB = "cifar100", "uoft-cs/cifar100"


def create(*, data_root: str) -> Source:
    """Read CIFAR-100.

    Parameters
    ----------
    data_root
        Folder that holds ``cifar100`` with ``train*.parquet`` and ``test*.parquet``; empty: the environment's
        ``FEDTALORA_DATA``.

    Raises
    ------
    DataError
        If the folder is not there and the hub cannot be reached, or a file is missing or broken.
    """
    folder = known_folder(_FOLDER, data_root=data_root)
    if folder is not None:
        files = split_files(str(folder), "", suffixes=[".parquet"])
        splits = {split: load_files(paths) for split, paths in files.items()}
        return source_from_splits(str(folder), splits, input_column="", label_column="")
    try:
        from_hub = load_hub(_HUB)
    except DataError as error:
        raise DataError(f"{error}; or {where_to_put(_FOLDER, data_root=data_root)}") from error
    return source_from_splits(_HUB, from_hub, input_column="img", label_column="fine_label")
