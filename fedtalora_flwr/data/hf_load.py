"""Tables of Hugging Face `datasets` from files, the hub, its cache or a local folder.

`datasets` is imported inside the functions: it takes a second, and not every source needs it.
"""

import glob
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fedtalora_flwr.data.source import DataError
from fedtalora_flwr.data.tables import dialect_of, encoding_of, uneven_row

if TYPE_CHECKING:
    from datasets import Dataset

_BUILDERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv"}
_Found = TypeVar("_Found")

_HUB_TIMEOUT = 5.0  # seconds; `datasets` itself retries for half a minute before it says "offline"


def load_files(files: Sequence[Path]) -> "Dataset":
    """Load Parquet, JSON (Lines), CSV or TSV files of one kind as one memory-mapped table.

    Parameters
    ----------
    files
        At least one file.

    Raises
    ------
    DataError
        If a file is of another kind or cannot be read.
    """
    import datasets

    kinds = {file.suffix.lower() for file in files}
    if len(kinds) > 1 or not kinds <= _BUILDERS.keys():
        raise DataError(
            f"files of a split must all be of one kind, one of {', '.join(_BUILDERS)}, "
            f"got {', '.join(map(str, files))}; convert them"
        )
    builder = _BUILDERS[kinds.pop()]
    options = _options(builder, files)
    datasets.disable_progress_bars()
    heard = datasets.logging.get_verbosity()
    try:
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what is wrong is said below, once
        rows: Dataset = datasets.load_dataset(
            builder,
            data_files=[glob.escape(str(file)) for file in files],
            split="train",
            trust_remote_code=False,
            **options,
        )
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        _refuse_uneven(builder, files)
        cause = error.__cause__ or error
        fix = "check that the file is complete"
        if isinstance(cause, OSError):
            fix += " and that the cache folder (HF_DATASETS_CACHE) can be written"
        names = ", ".join(map(str, files))
        raise DataError(f"{names} cannot be read as {builder}: {str(cause).strip()}; {fix}") from error
    finally:
        datasets.logging.set_verbosity(heard)
    # Where every row has a field more than the header, pandas takes the first for an index and goes on.
    if builder == "csv" and "__index_level_0__" in rows.column_names:
        _refuse_uneven(builder, files)
    return rows


def _options(builder: str, files: Sequence[Path]) -> dict[str, Any]:
    """Say how files are written, as far as `datasets` would not find it."""
    if builder == "json":
        return {"encoding": _only([encoding_of(file) for file in files], files)}
    if builder != "csv":
        return {}
    dialect = _only([dialect_of(file) for file in files], files)
    return {
        "keep_default_na": False,  # a sentence "null" or a class "NA" is text, not a missing value
        "sep": dialect.separator,
        "encoding": dialect.encoding,
        "decimal": dialect.decimal,
        "skiprows": dialect.num_skipped or None,
    }


def _only(found: Sequence[_Found], files: Sequence[Path]) -> _Found:
    if odd := next((place for place, one in enumerate(found) if one != found[0]), 0):
        raise DataError(
            f"{files[0]} and {files[odd].name} are written in different ways ({found[0]} and {found[odd]}); save them "
            "from one program, in one format"
        )
    return found[0]


def _refuse_uneven(builder: str, files: Sequence[Path]) -> None:
    if builder != "csv":
        return
    for file in files:
        if odd := uneven_row(file):
            raise DataError(
                f"rows of {file} have more fields than the header: {odd}; put texts that hold the separator in double "
                "quotes"
            )


def load_hub(name: str, *, config: str | None = None) -> Mapping[str, "Dataset"]:
    """Load all splits of a data set from the hub, its cache, or a local folder laid out like one.

    Parameters
    ----------
    name
        ``owner/name`` on the hub, or the path of a folder.
    config
        Which of the data set's configurations; None where it has one.

    Raises
    ------
    DataError
        If there is no such data set or folder, the hub cannot be reached and the cache has no copy, or the
        data cannot be read.
    """
    import datasets

    is_local = name.startswith((".", "/", "~")) or Path(name).is_dir()
    folder = Path(name).expanduser().absolute()
    if is_local and not folder.is_dir():
        raise DataError(f"there is no folder {folder}; correct the path in hub:{name}")
    datasets.disable_progress_bars()
    configured = datasets.config.HF_HUB_OFFLINE
    offline = not is_local and (configured or not _hub_answers(name))
    try:
        datasets.config.HF_HUB_OFFLINE = offline or configured  # straight to the cache
        loaded: Mapping[str, Dataset] = datasets.load_dataset(
            str(folder) if is_local else name, config, trust_remote_code=False
        )
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError) as error:
        if is_local:
            raise DataError(f"{folder} cannot be loaded: {error.__cause__ or error}") from error
        reason = "no connection and no cached copy" if offline else str(error.__cause__ or error)
        raise DataError(
            f"{name} cannot be loaded from the Hugging Face hub ({reason}); "
            "check the name and the connection, or give the path of a local copy"
        ) from error
    finally:
        datasets.config.HF_HUB_OFFLINE = configured
    return loaded


def _hub_answers(name: str) -> bool:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        HfApi().dataset_info(name, timeout=_HUB_TIMEOUT)
    except HfHubHTTPError:
        return True  # it answered; what is wrong with the name `load_dataset` says better
    except Exception:  # every failure to reach it, whichever HTTP library is underneath
        return False
    return True
