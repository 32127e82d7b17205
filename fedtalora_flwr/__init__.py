"""Federated continual fine-tuning of pre-trained transformers with LoRA (Fed-TaLoRA, arXiv 2505.12318)."""

from importlib.metadata import version

__version__ = version("fedtalora")
