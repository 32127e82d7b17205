"""The backbone with its LoRA layers and heads, its training, and what a process keeps of it."""
