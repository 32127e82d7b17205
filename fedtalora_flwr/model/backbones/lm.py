"""Causal language models of transformers: ``lm:<hub name>``, ``lm:/path/to/folder``, ``lm:/path/to/file.gguf``.

An example is a prompt and its answer in the words of the tokenizer's chat template, or, where it has none, with an
empty line between them. The loss, the mean over a batch, is that of the answer's tokens alone,

    loss = -mean_t log p(token_t | all tokens before t),   t in the answer, its end among them.

A Conv1D, as GPT-2 has them, is a Linear that is written down transposed, and is one here.
"""

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from logging import getLogger
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, logging
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from fedtalora_flwr.data import Source, Split
from fedtalora_flwr.data.instructions import Instruction
from fedtalora_flwr.model.backbones.architectures import decoder_placement, require_decoder
from fedtalora_flwr.model.backbones.base import Backbone, BackboneError

log = getLogger("fedtalora.data")

_NOT_LEARNT = -100  # transformers' mark of a token without a loss
_PADDING = -1  # in place of a token: no model has it, where the end of a text may be what pads
_ANSWERS_SHARE = 4  # a prompt is cut to leave the answer this part of max-length
_SHORTEST = 16  # tokens, so that a few are an answer's
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class LanguageBackbone(Backbone):
    """A causal language model.

    Parameters
    ----------
    model, tokenizer
        From one pre-trained folder.
    max_length
        Tokens kept of a prompt with its answer.
    gradient_checkpointing
        Compute each block once more on the way back instead of keeping what it gave.

    Raises
    ------
    BackboneError
        If the tokenizer has no end token, `max_length` is beyond the model's, or none of its layers is known.
    """

    transposed: frozenset[str]  # layers that its files hold as Conv1D

    def __init__(self, model: nn.Module, tokenizer: Any, *, max_length: int, gradient_checkpointing: bool) -> None:
        super().__init__()
        self.transposed = _as_linear(model)
        self.model = model
        self.modality = "instruction"
        self.feature_dim = int(model.config.hidden_size)  # type: ignore[union-attr, arg-type]
        self.placement = decoder_placement(model)
        longest = getattr(model.config, "max_position_embeddings", None)
        if max_length < _SHORTEST or (longest is not None and max_length > longest):
            most = f" and at most {longest}" if longest else ""
            raise BackboneError(
                f"max-length must be at least {_SHORTEST}{most} for {type(model).__name__}, got {max_length}"
            )
        if tokenizer.eos_token_id is None:
            raise BackboneError("the tokenizer has no end token (eos_token), so that no answer would ever end")
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._checkpointing = gradient_checkpointing
        if gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]

    def encode(self, split: Split, rows: NDArray[np.int64], *, source: Source) -> Tensor:
        """Tokenise instructions into int32 (N, 2, L): all tokens, and those of the answers; the rest is marked."""
        found = [self._tokens(example) for example in split.read(rows)]
        if cut := sum(was_cut for *_, was_cut in found):
            log.info("%d of %d prompts of %s are cut to max-length %d", cut, len(found), source.name, self._max_length)
        longest = max((len(prompt) + len(answer) for prompt, answer, _ in found), default=1)
        encoded = torch.empty(len(found), 2, longest, dtype=torch.int32)
        encoded[:, 0], encoded[:, 1] = _PADDING, _NOT_LEARNT
        for row, (prompt, answer, _) in enumerate(found):
            end = len(prompt) + len(answer)
            encoded[row, 0, :end] = torch.tensor(prompt + answer, dtype=torch.int32)
            encoded[row, 1, len(prompt) : end] = torch.tensor(answer, dtype=torch.int32)
        return encoded

    def _tokens(self, example: Instruction) -> tuple[list[int], list[int], bool]:
        """Tokenise a prompt and its answer; tell whether the prompt was cut."""
        asked, answered = self._written(example.prompt, example.answer)
        answer = self._ids(answered)
        room = self._max_length - min(len(answer), self._max_length // _ANSWERS_SHARE)
        prompt, content, was_cut = self._ids(asked), self._ids(example.prompt), False
        while len(prompt) > room and content:  # the template around it stays whole
            content = content[: -(len(prompt) - room)]
            prompt = self._ids(self._written(self._tokenizer.decode(content), "")[0])
            was_cut = True
        prompt = prompt[:room]
        return prompt, answer[: self._max_length - len(prompt)], was_cut

    def _written(self, prompt: str, answer: str) -> tuple[str, str]:
        """Write a prompt up to where the answer begins, and the answer with its end; no answer is none to learn."""
        if not self._tokenizer.chat_template:
            return f"{self._tokenizer.bos_token or ''}{prompt}\n\n", answer and answer + self._tokenizer.eos_token
        asked = [{"role": "user", "content": prompt}]
        before: str = self._tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
        if not answer:
            return before, ""
        whole: str = self._tokenizer.apply_chat_template(
            [*asked, {"role": "assistant", "content": answer}], tokenize=False
        )
        # Some templates write the turns before an answer otherwise than those before none.
        after = whole.removeprefix(before) if whole.startswith(before) else answer + self._tokenizer.eos_token
        return before, after.rstrip()

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def batch_order(self, inputs: Tensor) -> Tensor:
        """Put examples of like length side by side: a batch is cut to its longest."""
        order: Tensor = (inputs[:, 0] != _PADDING).sum(1).argsort(stable=True)
        return order

    def answer_logits(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Score the tokens of the answers in a batch (n, 2, L), each by those before it: (m, V) float32, and (m,) ids.

        Texts are padded behind, where no token looks.
        """
        longest = int((batch[:, 0] != _PADDING).sum(1).max())
        ids, labels = batch[:, 0, :longest].long(), batch[:, 1, :longest].long()
        first = int((labels != _NOT_LEARNT).any(0).nonzero().min())  # no prompt is empty: 1 at least
        logits = self._output(ids, logits_to_keep=torch.arange(first - 1, longest - 1, device=ids.device)).logits
        wanted = labels[:, first:]
        learnt = wanted != _NOT_LEARNT
        return logits[learnt].float(), wanted[learnt]

    def next_logits(self, batch: Tensor) -> Tensor:
        """Score the first token of each answer, after prompts (n, 2, L) without one: (n, V) float32."""
        lengths = (batch[:, 0] != _PADDING).sum(1)
        return torch.cat(
            [
                self._output(row[None, 0, :n].long(), logits_to_keep=1).logits[:, -1].float()
                for row, n in zip(batch, lengths.tolist(), strict=True)
            ]
        )

    def pool(self, batch: Tensor, *, augment: str, generator: torch.Generator | None) -> Tensor:
        """Give the mean of a prompt's last hidden states (n, d); its answer has no part in it."""
        asked = (batch[:, 0] != _PADDING) & (batch[:, 1] == _NOT_LEARNT)
        longest = int(asked.sum(1).max())
        ids, mask = batch[:, 0, :longest].long(), asked[:, :longest]
        hidden = self._output(ids, output_hidden_states=True, logits_to_keep=1).hidden_states[-1]  # (n, L, d)
        weights = (mask / mask.sum(1, keepdim=True)).unsqueeze(-1).to(hidden.dtype)
        mean: Tensor = (hidden * weights).sum(1)
        return mean.float()

    def _output(self, ids: Tensor, **wanted: Any) -> Any:
        if self._checkpointing:
            # transformers looks at `training`, which also lets layers drop out: it is set for the block and not below.
            for module in self.model.modules():
                if isinstance(module, GradientCheckpointingLayer):
                    module.training = torch.is_grad_enabled()
        return self.model(input_ids=ids.clamp(min=0), use_cache=False, **wanted)

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        on_text: Callable[[str], None] | None = None,
    ) -> list[str]:
        """Answer prompts.

        Parameters
        ----------
        prompts
            At least one.
        max_new_tokens
            Of an answer, at most.
        temperature
            0 takes the likeliest token each time.
        seed
            Of the draws, where the temperature is above 0.
        on_text
            Is told of each piece of the answer as it comes; one prompt at a time then.
        """
        found = [self._tokens(Instruction(prompt))[0] for prompt in prompts]
        longest = max(map(len, found))
        end = self._tokenizer.eos_token_id
        ids = torch.tensor([[end] * (longest - len(one)) + one for one in found])
        mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in found])
        device = next(self.model.parameters()).device
        sampled = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
        streamer = None if on_text is None else _Streamer(self._tokenizer, on_text)
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            written = self.model.generate(  # type: ignore[operator]
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=max_new_tokens,
                pad_token_id=end,
                streamer=streamer,
                **sampled,
            )
        answers: list[str] = self._tokenizer.batch_decode(written[:, longest:], skip_special_tokens=True)
        return [answer.strip() for answer in answers]

    def unfuse_attention(self) -> None:
        """Use transformers' own attention in steps."""
        self.model.set_attn_implementation("eager")  # type: ignore[operator]

    def save(self, folder: Path, *, class_names: Sequence[str] = (), rows: Mapping[str, Tensor] | None = None) -> bool:
        """Write a folder for ``AutoModelForCausalLM`` and ``AutoTokenizer``; it has no place for class rows."""
        weights = {
            name: value.T.contiguous() if name.removesuffix(".weight") in self.transposed else value
            for name, value in self.model.state_dict().items()
        }
        self.model.save_pretrained(folder, state_dict=weights)  # type: ignore[operator]
        self._tokenizer.save_pretrained(folder)
        return False

    def preparation(self) -> dict[str, Any]:
        """Give the number of tokens that are kept of an example, and whether the tokenizer writes a chat."""
        return {"max_length": self._max_length, "chat": bool(self._tokenizer.chat_template)}


class _Streamer:
    """Gives transformers' generate a place to put tokens, and passes on the text that they add."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        self._tokenizer, self._on_text = tokenizer, on_text
        self._ids: list[int] | None = None  # None until the prompt has passed
        self._told = ""

    def put(self, value: Tensor) -> None:
        """Take tokens; the first are the prompt."""
        if self._ids is None:
            self._ids = []
            return
        self._ids += value.flatten().tolist()
        self._tell(last=False)

    def end(self) -> None:
        """Tell what was held back."""
        self._tell(last=True)

    def _tell(self, *, last: bool) -> None:
        text = self._tokenizer.decode(self._ids or [], skip_special_tokens=True)
        if last or not text.endswith("\ufffd"):  # half of a character of several bytes
            self._on_text(text.removeprefix(self._told))
            self._told = text


def _as_linear(model: nn.Module) -> frozenset[str]:
    """Put a Linear in the place of each Conv1D, and name these."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, Conv1D)}
    for name, conv in found.items():
        d_in, d_out = conv.weight.shape
        linear = nn.Linear(d_in, d_out, device="meta")
        linear.weight, linear.bias = nn.Parameter(conv.weight.detach().T.contiguous()), conv.bias
        model.set_submodule(name, linear)
    return frozenset(found)


def create(argument: str, *, max_length: int, base_dtype: str, gradient_checkpointing: bool) -> LanguageBackbone:
    """Load the language model `argument`, a hub name, a folder or a .gguf file, with its tokenizer.

    Raises
    ------
    BackboneError
        If it cannot be read or fetched, lacks weights, or is no causal language model of an architecture that is known
        here.
    """
    logging.disable_progress_bar()
    source, options = argument, {}
    if argument.endswith(".gguf"):
        if find_spec("gguf") is None:
            raise BackboneError(f"language model {argument!r}: .gguf files need the package gguf: pip install gguf")
        source, options = str(Path(argument).expanduser().parent), {"gguf_file": Path(argument).name}
    try:
        require_decoder(AutoConfig.from_pretrained(source, trust_remote_code=False, **options))
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **options)
        model, loaded = AutoModelForCausalLM.from_pretrained(
            source, dtype=_DTYPES[base_dtype], output_loading_info=True, trust_remote_code=False, **options
        )
    except BackboneError as error:
        raise BackboneError(f"language model {argument!r} cannot be used: {error}") from None
    except Exception as error:  # the hub's client, unpickling and safetensors raise what they like
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise BackboneError(
            f"language model {argument!r} cannot be had: {reason}; give lm: a folder with config.json, "
            "model.safetensors and the tokenizer's files, a .gguf file, or a hub name where the hub can be reached"
        ) from error
    if absent := sorted(loaded["missing_keys"]):
        raise BackboneError(
            f"language model {argument!r} lacks {len(absent)} weights of {type(model).__name__}, e.g. {absent[0]}; "
            "give a folder whose model.safetensors is complete and of its config.json"
        )
    if options:  # what was 4 bits in the file is no more, and is written down as any other
        del model.config.quantization_config
        model.hf_quantizer, model.is_quantized = None, False
    try:
        backbone = LanguageBackbone(
            model, tokenizer, max_length=max_length, gradient_checkpointing=gradient_checkpointing
        )
    except BackboneError as error:
        raise BackboneError(f"language model {argument!r} cannot be used: {error}") from None
    backbone.hub_name = None if options or Path(argument).is_dir() else argument
    return backbone
