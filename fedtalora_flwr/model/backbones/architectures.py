"""Text architectures of transformers: what loads them, where their Linear layers are, how long texts go.

The names of the layers stand in tables here, of encoders and of decoders. Of a role that they find nothing for, PEFT's
table for the architecture is asked.
"""

import re
from collections.abc import Mapping
from typing import Any

from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_NAMES
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_TEXT_ENCODING_MAPPING,
    AutoModel,
    AutoModelForTextEncoding,
)

from fedtalora_flwr.model.backbones.base import BackboneError, Placement, find_placement

WORKING = (
    "BERT, RoBERTa, XLM-RoBERTa, ELECTRA, DistilBERT, MPNet, ModernBERT, DeBERTa (v1 to v3), ALBERT, and those of T5, "
    "mT5 and UMT5"
)
_BLOCKS = re.compile(
    r"(encoder|transformer)\.layer\.\d+"  # BERT and most others; DistilBERT
    r"|layers\.\d+"  # ModernBERT
    r"|encoder\.albert_layer_groups\.\d+\.albert_layers\.\d+"  # one block, however often a text passes it
    r"|encoder\.block\.\d+"  # T5
)
_ROLES = {
    "q": (
        "attention.self.query",  # BERT, RoBERTa, ELECTRA
        "attention.q_lin",  # DistilBERT
        "attention.attn.q",  # MPNet
        "attention.self.query_proj",  # DeBERTa v2 and v3
        "attention.query",  # ALBERT
        "layer.0.SelfAttention.q",  # T5
    ),
    "k": (
        "attention.self.key",
        "attention.k_lin",
        "attention.attn.k",
        "attention.self.key_proj",
        "attention.key",
        "layer.0.SelfAttention.k",
    ),
    "v": (
        "attention.self.value",
        "attention.v_lin",
        "attention.attn.v",
        "attention.self.value_proj",
        "attention.value",
        "layer.0.SelfAttention.v",
    ),
    "qkv": ("attn.Wqkv",),  # ModernBERT, its rows in timm's order
    "proj": (
        "attention.output.dense",
        "attention.out_lin",
        "attention.attn.o",
        "attention.dense",
        "layer.0.SelfAttention.o",
        "attn.Wo",
    ),
    "fc1": (
        "intermediate.dense",
        "ffn.lin1",
        "ffn",
        "mlp.Wi",  # gate and input in one
        "layer.1.DenseReluDense.wi",
        "layer.1.DenseReluDense.wi_0",  # of a gated T5: gate and input
        "layer.1.DenseReluDense.wi_1",
    ),
    "fc2": ("output.dense", "ffn.lin2", "ffn_output", "mlp.Wo", "layer.1.DenseReluDense.wo"),
}
_DECODERS = "Llama, Mistral, Qwen 2 and 3, Gemma, SmolLM, Phi, OPT, GPT-2, GPT-NeoX"
_DECODER_BLOCKS = re.compile(
    r"(model|gpt_neox|model\.decoder)\.layers\.\d+"  # Llama and its kin; GPT-NeoX; OPT
    r"|transformer\.h\.\d+"  # GPT-2
)
_DECODER_ROLES = {
    "q": ("self_attn.q_proj",),
    "k": ("self_attn.k_proj",),
    "v": ("self_attn.v_proj",),
    "qkv": ("attn.c_attn",),  # GPT-2, in thirds
    # q, k and v of unlike sizes, or head by head, so that they are no thirds to split
    "in_proj": ("self_attn.qkv_proj", "attention.query_key_value"),
    "proj": ("self_attn.o_proj", "self_attn.out_proj", "self_attn.dense", "attention.dense", "attn.c_proj"),
    "fc1": ("mlp.gate_proj", "mlp.up_proj", "mlp.gate_up_proj", "mlp.fc1", "fc1", "mlp.dense_h_to_4h", "mlp.c_fc"),
    "fc2": ("mlp.down_proj", "mlp.fc2", "fc2", "mlp.dense_4h_to_h", "mlp.c_proj"),
}
_ROLES_OF_PEFT = {  # role -> what its Linear may be called in PEFT's table
    "q": {"q", "query", "q_proj", "query_proj"},
    "k": {"k", "key", "k_proj", "key_proj"},
    "v": {"v", "value", "v_proj", "value_proj"},
    "in_proj": {"in_proj"},  # DeBERTa v1: q, k and v head by head, so that they are no thirds to split
}


def encoder_class(config: Any) -> Any:
    """Choose the class of transformers that loads the encoder of a configuration, and no decoder.

    Raises
    ------
    BackboneError
        If there is a decoder only, or one that the encoder does not come without.
    """
    kind = type(config)
    alone = kind in MODEL_FOR_TEXT_ENCODING_MAPPING
    if getattr(config, "is_encoder_decoder", False) and not alone:
        raise BackboneError(
            f"{config.model_type} is an encoder that does not come without its decoder; encoders that work: {WORKING}"
        )
    next_token_alone = kind in MODEL_FOR_CAUSAL_LM_MAPPING and kind not in MODEL_FOR_MASKED_LM_MAPPING
    if next_token_alone or getattr(config, "is_decoder", False):
        raise BackboneError(f"{config.model_type} is a decoder, for the next token; encoders that work: {WORKING}")
    return AutoModelForTextEncoding if alone else AutoModel


def require_decoder(config: Any) -> None:
    """Refuse the configuration of what does not write texts token by token.

    Raises
    ------
    BackboneError
        If it is that of an encoder, or of an encoder with a decoder.
    """
    if getattr(config, "is_encoder_decoder", False) or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise BackboneError(f"{config.model_type} is no causal language model; such that work: {_DECODERS}")
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING:  # BERT has a class for it too, which nobody has trained
        raise BackboneError(f"{config.model_type} is an encoder: give it as hf:, or lm: one of {_DECODERS}")


def text_placement(model: nn.Module) -> Placement:
    """Find where LoRA can go in a text encoder.

    Raises
    ------
    BackboneError
        If none of its Linear layers is known; the message lists them, and the architectures that work.
    """
    return _placement(model, blocks=_BLOCKS, table=_ROLES, working=f"encoders that work: {WORKING}")


def decoder_placement(model: nn.Module) -> Placement:
    """Find where LoRA can go in a causal language model, as `text_placement` does in an encoder.

    Raises
    ------
    BackboneError
        If none of its Linear layers is known; the message lists them, and the architectures that work.
    """
    return _placement(
        model, blocks=_DECODER_BLOCKS, table=_DECODER_ROLES, working=f"language models that work: {_DECODERS}"
    )


def _placement(
    model: nn.Module, *, blocks: re.Pattern[str], table: Mapping[str, tuple[str, ...]], working: str
) -> Placement:
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    inside = {name[block.end() + 1 :] for name in linear if (block := blocks.match(name))}
    roles = {role: names for role, names in table.items() if inside.intersection(names)}
    of_peft = PEFT_NAMES.get(model.config.model_type, ())  # type: ignore[union-attr]
    for role, spellings in _ROLES_OF_PEFT.items():
        known = spellings.intersection(of_peft)
        if role not in roles and (names := sorted(name for name in inside if name.rpartition(".")[2] in known)):
            roles[role] = tuple(names)
    if not roles:
        kinds = sorted({re.sub(r"\.\d+\b", ".N", name) for name in linear})
        raise BackboneError(
            f"the layers of {type(model).__name__} are not known here; {working}. "
            f"Its Linear layers: {', '.join(kinds[:20]) or 'none'}"
        )
    return find_placement(model, blocks=blocks, roles=roles)


def num_positions(model: nn.Module) -> int | None:
    """Count the tokens that a text can have; None: any number, the positions are relative (T5, DeBERTa v2 and v3)."""
    config = model.config
    total: int | None = getattr(config, "max_position_embeddings", None)
    positions = getattr(getattr(model, "embeddings", None), "position_embeddings", None)
    if positions is None:
        return None if getattr(config, "relative_attention", False) else total
    # RoBERTa and MPNet number theirs from behind the padding's.
    return total if total is None or positions.padding_idx is None else total - int(positions.padding_idx) - 1
