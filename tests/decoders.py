"""Small causal language models with a tokenizer of bytes, in folders as transformers writes them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

END, PAD = "<|end|>", "<|pad|>"
CHAT = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 128,
}


def byte_tokenizer(*, chat: bool = True) -> transformers.PreTrainedTokenizerFast:
    """A token for each byte, and those that end a turn and pad."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=PAD)
    if chat:
        fast.chat_template = CHAT
    return fast


def small_decoder(folder: Path, kind: str = "llama", *, chat: bool = True, **sizes: Any) -> Path:
    """Write a random model of a kind that transformers knows, and its tokenizer."""
    tokenizer = byte_tokenizer(chat=chat)
    config_class = transformers.CONFIG_MAPPING[kind]
    tokens = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = config_class(vocab_size=len(tokenizer), **tokens, **{**SIZES, **sizes})
    torch.manual_seed(7)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def instructions(folder: Path, tasks: Sequence[str] = ("add", "echo", "shout"), *, each: int = 10) -> Path:
    """Write a table of instructions in some tasks, each of which is learnt from few examples."""
    import csv

    ask = {
        "add": lambda n: (f"{n} plus 1", str(n + 1)),
        "echo": lambda n: (f"say {n}", f"{n}"),
        "shout": lambda n: (f"shout {n}", f"{n}!"),
    }
    path = folder / "train.csv"
    with path.open("w", newline="") as file:
        rows = [(*ask[task](n), "" if n % 2 else "with care", task) for task in tasks for n in range(each)]
        csv.writer(file).writerows([("instruction", "response", "context", "category"), *rows])
    return path
