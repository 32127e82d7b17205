"""Text encoders of transformers: ``hf:bert-base-uncased``, ``hf:/path/to/folder``."""

import inspect
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import MODEL_MAPPING, AutoConfig, AutoTokenizer, DebertaModel, logging

from fedtalora_flwr.data import Source, Split
from fedtalora_flwr.model.backbones.architectures import encoder_class, num_positions, text_placement
from fedtalora_flwr.model.backbones.base import Backbone, BackboneError

# A token's number and, where the model tells the texts of a pair apart by it, its type, in one whole number.
_TYPE_SHIFT = 24
_ID_MASK = (1 << _TYPE_SHIFT) - 1


class TextBackbone(Backbone):
    """A transformers encoder whose feature is the mean over tokens.

    Parameters
    ----------
    model, tokenizer
        From one pre-trained folder.
    max_length
        Tokens kept of a text, or of both texts of a pair.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, *, max_length: int) -> None:
        super().__init__()
        self.model = model
        self.modality = "text"
        self.feature_dim = int(model.config.hidden_size)  # type: ignore[union-attr, arg-type]
        self.placement = text_placement(model)
        longest = num_positions(model)
        if longest is not None and max_length > longest:
            raise BackboneError(f"max-length must be at most {longest} for {type(model).__name__}, got {max_length}")
        self._tokenizer = tokenizer
        self._max_length = max_length
        self.token_types = _takes_types(model, tokenizer)
        self._in_float32 = isinstance(model, DebertaModel)  # v1 masks bf16 scores by a number that only float32 has

    def encode(self, split: Split, rows: NDArray[np.int64], *, source: Source) -> Tensor:
        """Tokenise texts and pairs of texts into int32 (N, L), padded to the longest of them.

        A token's type stands above its number: a pair is told apart by what the tokenizer says of it, not by where a
        separator stands, which may be part of a text.
        """
        texts = [(one,) if isinstance(one, str) else tuple(one) for one in split.read(rows)]
        parts = []
        for number in (1, 2):
            places = [place for place, one in enumerate(texts) if len(one) == number]
            if places:  # the tokenizer takes no empty list; a partition may be empty
                parts.append((places, self._tokens(*zip(*(texts[place] for place in places), strict=True))))
        longest = max((tokens.shape[1] for _, tokens in parts), default=1)
        encoded = torch.full((len(texts), longest), self._tokenizer.pad_token_id, dtype=torch.int32)
        for places, tokens in parts:
            encoded[places, : tokens.shape[1]] = tokens
        return encoded

    def _tokens(self, *texts: Sequence[str]) -> Tensor:
        """Tokenise texts, or first and second texts, of which the longer one is cut first."""
        tokens = self._tokenizer(
            *map(list, texts), padding=True, truncation=True, max_length=self._max_length, return_tensors="pt"
        )
        ids: Tensor = tokens["input_ids"].int()
        return ids + (tokens["token_type_ids"].int() << _TYPE_SHIFT) if self.token_types else ids

    def batch_order(self, inputs: Tensor) -> Tensor:
        """Put texts of like length side by side: a batch is cut to its longest text."""
        order: Tensor = self._is_token(inputs & _ID_MASK).sum(1).argsort(stable=True)
        return order

    def _is_token(self, ids: Tensor) -> Tensor:
        found: Tensor = ids != self._tokenizer.pad_token_id
        return found

    def pool(self, batch: Tensor, *, augment: str, generator: torch.Generator | None) -> Tensor:
        """Encode tokens (n, L) into features (n, d); text has no augmentation."""
        ids = batch & _ID_MASK
        mask = self._is_token(ids)
        longest = int(mask.any(0).nonzero().max()) + 1
        ids, mask = ids[:, :longest].long(), mask[:, :longest]
        types = {"token_type_ids": (batch[:, :longest] >> _TYPE_SHIFT).long()} if self.token_types else {}
        with torch.autocast(batch.device.type, enabled=False) if self._in_float32 else nullcontext():
            hidden = self.model(input_ids=ids, attention_mask=mask.long(), **types).last_hidden_state  # (n, L, d)
        weights = (mask / mask.sum(1, keepdim=True)).unsqueeze(-1).to(hidden.dtype)
        mean: Tensor = (hidden * weights).sum(1)
        return mean

    def unfuse_attention(self) -> None:
        """Use transformers' own attention in steps."""
        self.model.set_attn_implementation("eager")  # type: ignore[operator]

    def save(self, folder: Path, *, class_names: Sequence[str] = (), rows: Mapping[str, Tensor] | None = None) -> bool:
        """Write a folder for `auto_class` and ``AutoTokenizer``; transformers has no classifier on a scaled mean."""
        if class_names:
            self.model.config.id2label = dict(enumerate(class_names))  # type: ignore[union-attr]
            self.model.config.label2id = {name: index for index, name in enumerate(class_names)}  # type: ignore[union-attr]
        self.model.save_pretrained(folder)  # type: ignore[operator]
        self._tokenizer.save_pretrained(folder)
        return False

    def preparation(self) -> dict[str, Any]:
        """Give the tokens kept of a text, whether the model is told their types, and the class that loads it."""
        return {"max_length": self._max_length, "token_types": self.token_types, "auto_class": self.auto_class}

    @property
    def auto_class(self) -> str:
        """Name transformers' class that loads this encoder alone; AutoModel would give a T5's its decoder too."""
        by_auto_model = isinstance(self.model, MODEL_MAPPING.get(type(self.model.config), ()))
        return "AutoModel" if by_auto_model else "AutoModelForTextEncoding"


def _takes_types(model: nn.Module, tokenizer: Any) -> bool:
    """Tell whether the tokenizer says which text of a pair a token is of, and the model has a use for it."""
    said = "token_type_ids"
    taken = said in tokenizer.model_input_names and said in inspect.signature(model.forward).parameters
    return taken and bool(getattr(model.config, "type_vocab_size", 0) > 1)


def create(argument: str, *, max_length: int) -> TextBackbone:
    """Load the encoder `argument`, a hub name or a folder, with its tokenizer.

    Raises
    ------
    BackboneError
        If it cannot be read or fetched, lacks weights, or is no encoder of an architecture that is known here.
    """
    logging.disable_progress_bar()
    try:
        chosen_class = encoder_class(AutoConfig.from_pretrained(argument, trust_remote_code=False))
        tokenizer = AutoTokenizer.from_pretrained(argument, trust_remote_code=False)
        model, loaded = chosen_class.from_pretrained(
            argument,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=False,
        )
    except BackboneError as error:
        raise BackboneError(f"text encoder {argument!r} cannot be used: {error}") from None
    except Exception as error:  # the hub's client, unpickling and safetensors raise what they like
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        # Without that package transformers asks for another, which does not help.
        package = "" if find_spec("sentencepiece") else " (for a spm.model or spiece.model: pip install sentencepiece)"
        raise BackboneError(
            f"text encoder {argument!r} cannot be had: {reason}; give hf: a folder with config.json, "
            f"model.safetensors and the tokenizer's files{package}, or a hub name where the hub can be reached"
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
