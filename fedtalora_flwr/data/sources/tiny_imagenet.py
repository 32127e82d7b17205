"""Tiny-ImageNet: 64x64 images of 200 classes, from the data root or else the hub.

Of the 200 classes the 100 that `vit_mini` was pre-trained on are left out, wherever the data come from; for all 200
give the same files as ``parquet`` or ``hub``.
"""

import json
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import numpy as np

from fedtalora_flwr.data.hf_load import load_files, load_hub
from fedtalora_flwr.data.hf_rows import source_from_splits
from fedtalora_flwr.data.locate import known_folder, split_files, where_to_put
from fedtalora_flwr.data.source import DataError, Source, take

_FOLDER, _HUB = "tiny-imagenet", "zh-plus/tiny-imagenet"


def create(*, data_root: str) -> Source:
    """Read Tiny-ImageNet.

    Parameters
    ----------
    data_root
        Folder that holds ``tiny-imagenet``; empty: the environment's ``FEDTALORA_DATA``.

    Raises
    ------
    DataError
        If the folder is not there and the hub cannot be reached, or a file is missing or broken.
    """
    folder = known_folder(_FOLDER, data_root=data_root)
    if folder is None:
        try:
            splits = load_hub(_HUB)
        except DataError as error:
            raise DataError(f"{error}; or {where_to_put(_FOLDER, data_root=data_root)}") from error
        return _novel(source_from_splits(_HUB, splits, input_column="", label_column=""))
    novel = folder / "train-novel.parquet"
    paths_of = (
        split_files(str(novel), str(folder / "val.parquet"), suffixes=[".parquet"])
        if novel.is_file()
        else split_files(str(folder), "", suffixes=[".parquet"])
    )
    source = source_from_splits(
        str(folder),
        {split: load_files(paths) for split, paths in paths_of.items()},
        input_column="image",
        label_column="label",
    )
    source = _novel(source)
    return replace(source, class_names=_readable(source.class_names, folder / "classes.json"))


def _novel(source: Source) -> Source:
    """Drop the training rows of the classes that `vit_mini` knows; classes are numbered by sorted WordNet id."""
    names = source.class_names
    if len(names) != 200 or list(names) != sorted(names):
        return source
    facts = json.loads((files("fedtalora_flwr.model.backbones") / "weights" / "vit_mini.json").read_text())
    kept = np.flatnonzero(~np.isin(source.train.labels, facts["base_classes"]))
    return replace(source, train=take(source.train, kept))


def _readable(wnids: tuple[str, ...], classes: Path) -> tuple[str, ...]:
    """Replace WordNet ids by names where the file that knows them is there."""
    if not classes.is_file():
        return wnids
    try:
        content = json.loads(classes.read_text(encoding="utf-8"))
        name_of = dict(zip(content["wnids"], content["names"], strict=True))
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{classes} must be JSON with lists wnids and names of one length ({error!r}); correct or remove it"
        ) from error
    return tuple(name_of.get(wnid, wnid) for wnid in wnids)
