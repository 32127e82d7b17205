"""Sentences in JSON, JSON Lines, CSV or TSV files with a text and a label column."""

from fedtalora_flwr.data.hf_load import load_files
from fedtalora_flwr.data.hf_rows import source_from_splits
from fedtalora_flwr.data.locate import split_files
from fedtalora_flwr.data.source import Source


def create(
    *,
    data_path: str,
    test_path: str,
    input_column: str,
    label_column: str,
    answer_column: str = "",
    bad_files: str = "error",
) -> Source:
    """Read text files; labels that are strings become classes in alphabetical order.

    Parameters
    ----------
    data_path
        A file, or a folder that holds ``train*`` and maybe ``test*`` or ``val*`` files.
    test_path
        A file or folder of test data; empty: as `data_path` has it.
    input_column, label_column
        Columns to use; empty: found by their usual names.
    answer_column
        Column of answers, where the texts are instructions; empty: they are not.
    bad_files
        ``skip`` leaves out rows without a label or an input.
    """
    files = split_files(data_path, test_path, suffixes=[".json", ".jsonl", ".csv", ".tsv"])
    splits = {split: load_files(paths) for split, paths in files.items()}
    return source_from_splits(
        data_path,
        splits,
        input_column=input_column,
        label_column=label_column,
        answer_column=answer_column,
        files=files,
        bad_files=bad_files,
    )
