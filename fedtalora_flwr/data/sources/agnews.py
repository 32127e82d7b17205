"""AG News: headlines and first sentences of news in 4 classes, from the data root or else the hub.

Zhang, Zhao and LeCun, "Character-level Convolutional Networks for Text Classification", 2015.
"""

from fedtalora_flwr.data.hf_known import known_source
from fedtalora_flwr.data.source import Source


def create(*, data_root: str) -> Source:
    """Read it from ``<data-root>/agnews`` or as ``fancyzhx/ag_news``, as `known_source` does."""
    return known_source("agnews", hub="fancyzhx/ag_news", data_root=data_root)
