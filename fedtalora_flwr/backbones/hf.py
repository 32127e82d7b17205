"""BERT-family text encoders of transformers: ``hf:bert-base-uncased``, ``hf:/path/to/folder``."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, logging

from fedtalora_flwr.backbones.base import Backbone, BackboneError, find_placement
from fedtalora_flwr.data import Source, Split

_BLOCKS = re.compile(r"(encoder|transformer)\.layer\.\d+")
_ROLES = {  # BERT, RoBERTa, ELECTRA; DistilBERT; MPNet
    "q": ("attention.self.query", "attention.q_lin", "attention.attn.q"),
    "k": ("attention.self.key", "attention.k_lin", "attention.attn.k"),
    "v": ("attention.self.value", "attention.v_lin", "attention.attn.v"),
    "proj": ("attention.output.dense", "attention.out_lin", "attention.attn.o"),
    "fc1": ("intermediate.dense", "ffn.lin1"),
    "fc2": ("output.dense", "ffn.lin2"),
}


class TextBackbone(Backbone):
    """A transformers encoder whose feature is the mean over tokens, scaled to unit variance.

    Parameters
    ----------
    model, tokenizer
        From one pre-trained folder.
    max_length
        Tokens kept of a text.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, *, max_length: int) -> None:
        super().__init__()
        self.model = model
        self.modality = "text"
        self.feature_dim = int(model.config.hidden_size)  # type: ignore[union-attr, arg-type]
        self.placement = find_placement(model, blocks=_BLOCKS, roles=_ROLES)
        if max_length > (longest := _num_positions(model)):
            raise BackboneError(f"max-length must be at most {longest} for {type(model).__name__}, got {max_length}")
        self._tokenizer = tokenizer
        self._max_length = max_length

    def encode(self, split: Split, rows: NDArray[np.int64], *, source: Source) -> Tensor:
        """Tokenise texts into int32 (N, L), padded to the longest of them."""
        if not len(rows):  # the tokenizer takes no empty list; a partition may be empty
            return torch.zeros(0, 1, dtype=torch.int32)
        tokens = self._tokenizer(
            list(split.read(rows)),
            padding=True,
            truncation=True,
            max_length=self._max_length,
            return_tensors="pt",
        )
        ids: Tensor = tokens["input_ids"].int()
        return ids

    def batch_order(self, inputs: Tensor) -> Tensor:
        """Put texts of like length side by side: a batch is cut to its longest text."""
        order: Tensor = (inputs != self._tokenizer.pad_token_id).sum(1).argsort(stable=True)
        return order

    def forward(self, batch: Tensor, *, augment: str = "none", generator: torch.Generator | None = None) -> Tensor:
        """Encode tokens (n, L) into features (n, d); text has no augmentation."""
        mask = batch != self._tokenizer.pad_token_id
        longest = int(mask.any(0).nonzero().max()) + 1
        ids, mask = batch[:, :longest].long(), mask[:, :longest]
        hidden = self.model(input_ids=ids, attention_mask=mask.long()).last_hidden_state  # (n, L, d)
        weights = (mask / mask.sum(1, keepdim=True)).unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * weights).sum(1)
        features: Tensor = F.normalize(mean, dim=-1) * self.feature_dim**0.5
        return features

    def unfuse_attention(self) -> None:
        """Use transformers' own attention in steps."""
        self.model.set_attn_implementation("eager")  # type: ignore[operator]

    def save(self, folder: Path, *, class_names: Sequence[str] = (), rows: Mapping[str, Tensor] | None = None) -> bool:
        """Write a folder for ``AutoModel`` and ``AutoTokenizer``; transformers has no classifier on a scaled mean."""
        if class_names:
            self.model.config.id2label = dict(enumerate(class_names))  # type: ignore[union-attr]
            self.model.config.label2id = {name: index for index, name in enumerate(class_names)}  # type: ignore[union-attr]
        self.model.save_pretrained(folder)  # type: ignore[operator]
        self._tokenizer.save_pretrained(folder)
        return False

    def preparation(self) -> dict[str, Any]:
        """Give the number of tokens that are kept of a text."""
        return {"max_length": self._max_length}


def _num_positions(model: nn.Module) -> int:
    """Count the tokens that a text can have; RoBERTa and MPNet number theirs from behind the padding's."""
    padding = model.get_submodule("embeddings.position_embeddings").padding_idx
    total = int(model.config.max_position_embeddings)  # type: ignore[union-attr, arg-type]
    return total if padding is None else total - int(padding) - 1  # type: ignore[arg-type]


def create(argument: str, *, max_length: int) -> TextBackbone:
    """Load the encoder `argument`, a hub name or a folder, with its tokenizer.

    Raises
    ------
    BackboneError
        If it cannot be read or fetched, lacks weights, or is no encoder of a known family.
    """
    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(argument)
        model, loaded = AutoModel.from_pretrained(
            argument, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except Exception as error:  # the hub's client, unpickling and safetensors raise what they like
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise BackboneError(
            f"text encoder {argument!r} cannot be had: {reason}; give hf: a folder with config.json, "
            "model.safetensors and the tokenizer's files, or a hub name where the hub can be reached"
        ) from error
    # transformers would leave these at random, with a line in its log.
    absent = [*loaded["missing_keys"], *(name for name, *_ in loaded["mismatched_keys"])]
    if absent := sorted(name for name in absent if not name.startswith("pooler.")):
        raise BackboneError(
            f"text encoder {argument!r} lacks {len(absent)} weights of {type(model).__name__}, or has them in other "
            f"shapes, e.g. {absent[0]}; give a folder whose model.safetensors is complete and of its config.json"
        )
    if getattr(model, "pooler", None) is not None:
        model.pooler = None  # unused by the mean, and its weights would count as parameters
    backbone = TextBackbone(model, tokenizer, max_length=max_length)
    backbone.hub_name = None if Path(argument).is_dir() else argument
    return backbone
