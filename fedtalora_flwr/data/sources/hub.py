"""Any data set of the Hugging Face hub with a usual layout, or a local folder laid out like one."""

from fedtalora_flwr.data.hf_load import load_hub
from fedtalora_flwr.data.hf_rows import source_from_splits
from fedtalora_flwr.data.source import Source


def create(*, argument: str, input_column: str, label_column: str, answer_column: str = "") -> Source:
    """Load a data set from the hub.

    Parameters
    ----------
    argument
        ``owner/name``, ``owner/name#config``, or the path of a folder.
    input_column, label_column
        Columns to use; empty: found by their usual names.
    answer_column
        Column of answers, where the texts are instructions; empty: they are not.
    """
    name, _, config = argument.partition("#")
    splits = load_hub(name, config=config or None)
    return source_from_splits(
        argument, splits, input_column=input_column, label_column=label_column, answer_column=answer_column
    )
