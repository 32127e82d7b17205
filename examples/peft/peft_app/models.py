"""Two small PEFT models with random weights, and made-up texts for each client."""

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

VOCABULARY, LENGTH, CLASSES, TEXTS = 50, 12, 4, 40
SMALL_BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
SMALL_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": LENGTH, "bos_token_id": 0, "eos_token_id": 0}


def build(kind: str) -> PeftModel:
    """Build a ``classifier`` (BERT) or a ``causal`` model (GPT-2): the same base weights in every process."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "causal":
            base = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, **SMALL_GPT2))
            lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
        else:
            base = BertForSequenceClassification(BertConfig(vocab_size=VOCABULARY, num_labels=CLASSES, **SMALL_BERT))
            lora = LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"])
        return get_peft_model(base, lora)


def batch(kind: str, partition_id: int) -> dict[str, Tensor]:
    """Draw a client's texts: its topic says which tokens are frequent, and which class most texts have."""
    generator = torch.Generator().manual_seed(partition_id)
    topic = torch.rand(CLASSES, VOCABULARY, generator=generator).pow(4)  # (classes, vocabulary), of this client
    labels = torch.where(
        torch.rand(TEXTS, generator=generator) < 0.7,
        partition_id % CLASSES,
        torch.randint(CLASSES, (TEXTS,), generator=generator),
    )
    texts = torch.multinomial(topic[labels], LENGTH, replacement=True, generator=generator)  # (texts, length)
    return {"input_ids": texts, "labels": texts if kind == "causal" else labels}
