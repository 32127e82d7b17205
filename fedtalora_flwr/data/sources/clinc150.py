"""CLINC150: sentences of 150 intents in 10 domains, from the data root or else the hub.

Larson et al., "An Evaluation Dataset for Intent Classification and Out-of-Scope Prediction", EMNLP 2019.
The out-of-scope sentences are left out: they are of no class.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fedtalora_flwr.data.hf_load import load_hub
from fedtalora_flwr.data.hf_rows import source_from_splits
from fedtalora_flwr.data.locate import known_folder, where_to_put
from fedtalora_flwr.data.source import DataError, Source, Split, take

_FOLDER, _HUB, _HUB_CONFIG, _OUT_OF_SCOPE = "clinc150", "clinc/clinc_oos", "plus", "oos"


def create(*, data_root: str) -> Source:
    """Read CLINC150; classes are ordered by domain where ``domains.json`` stands beside the sentences.

    Parameters
    ----------
    data_root
        Folder that holds ``clinc150``; empty: the environment's ``FEDTALORA_DATA``.

    Raises
    ------
    DataError
        If the folder is not there and the hub cannot be reached, or a file is missing or broken.
    """
    folder = known_folder(_FOLDER, data_root=data_root)
    if folder is None:
        return _from_hub(data_root)
    sentences = _read_json(folder / "data_full.json")
    domains = _read_json(folder / "domains.json") if (folder / "domains.json").is_file() else {}
    try:
        intents = {intent for _, intent in sentences["train"]}
        by_domain = [[intent for intent in found if intent in intents] for found in domains.values()]
        class_names = [intent for found in by_domain for intent in found] or sorted(intents)
        if sorted(class_names) != sorted(intents):
            raise DataError(
                f"{folder / 'domains.json'} must name each intent of data_full.json once; it differs in "
                f"{sorted(intents.symmetric_difference(class_names))[:3] or 'intents it names twice'}"
            )
        id_of = {intent: class_id for class_id, intent in enumerate(class_names)}
        return Source(
            name=str(folder),
            modality="text",
            class_names=tuple(class_names),
            train=_split(sentences["train"], id_of),
            test=_split(sentences["test"], id_of),
            groups=tuple(tuple(id_of[intent] for intent in found) for found in by_domain),
        )
    except DataError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DataError(
            f"{folder} is not laid out as CLINC150: data_full.json needs train and test, rows of "
            f"[text, intent] over the same intents, domains.json lists of intents ({error!r}); "
            "fetch the files again"
        ) from error


def _from_hub(data_root: str) -> Source:
    try:
        splits = load_hub(_HUB, config=_HUB_CONFIG)
    except DataError as error:
        raise DataError(f"{error}; or {where_to_put(_FOLDER, data_root=data_root)}") from error
    source = source_from_splits(_HUB, splits, input_column="text", label_column="intent")
    # A class without training rows is dropped everywhere by `tidy`.
    in_scope = [name != _OUT_OF_SCOPE for name in source.class_names]
    return replace(source, train=take(source.train, np.flatnonzero(np.array(in_scope)[source.train.labels])))


def _split(rows: list[list[str]], id_of: dict[str, int]) -> Split:
    texts = [text for text, _ in rows]
    labels = np.array([id_of[intent] for _, intent in rows], dtype=np.int64)
    return Split(labels=labels, read=lambda wanted: [texts[row] for row in wanted])


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); put the file there") from error
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}); fetch the file again") from error
    return content
