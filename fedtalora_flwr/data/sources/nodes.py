"""Every node brings its own folder, named by ``data-path`` in its node config; the server has no data."""

from fedtalora_flwr.data.node_folder import BadFiles, Layout
from fedtalora_flwr.data.own import OwnReader


def create(
    *,
    data_path: str,
    input_column: str,
    label_column: str,
    test_fraction: float,
    max_per_class: int,
    max_test_per_class: int = 0,
    bad_files: BadFiles = "error",
    folder_layout: Layout = "auto",
) -> OwnReader:
    """Build what reads a node's folder; nothing is read here.

    Parameters
    ----------
    data_path
        The folder of a node whose node config names none, with ``{partition-id}`` for the number; it is opened there.
    input_column, label_column, test_fraction, max_per_class, max_test_per_class, bad_files, folder_layout
        As of `OwnReader`.
    """
    return OwnReader(
        input_column, label_column, test_fraction, max_per_class, max_test_per_class, bad_files, folder_layout
    )
