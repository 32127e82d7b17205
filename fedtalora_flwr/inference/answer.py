"""Let a run's language model answer."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice

from fedtalora_flwr.aggregation import GlobalState
from fedtalora_flwr.data.instructions import Instruction
from fedtalora_flwr.inference.model import TrainedModel
from fedtalora_flwr.inference.predict import Item
from fedtalora_flwr.model.backbones.lm import LanguageBackbone


class AnswerError(ValueError):
    """Answers that cannot be had; the message says why."""


@dataclass(frozen=True)
class Wish:
    """How answers are to be written.

    Parameters
    ----------
    max_new_tokens
        Of each, at most.
    temperature
        0: the likeliest token each time.
    seed
        Of the draws.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    seed: int = 0


def language_backbone(trained: TrainedModel) -> LanguageBackbone:
    """Give the backbone of a run's language model.

    Raises
    ------
    AnswerError
        If the run's model is none.
    """
    backbone = trained.model.backbone
    if not isinstance(backbone, LanguageBackbone):
        raise AnswerError(
            f"{trained.record.path}: backbone {trained.config.backbone} classifies {backbone.modality}s and writes no "
            "answers; use fedtalora predict"
        )
    return backbone


def answers(
    trained: TrainedModel, prompts: Sequence[str], wish: Wish, *, on_text: Callable[[str], None] | None = None
) -> list[str]:
    """Answer prompts; in a run with clusters each by the cluster that its features point to.

    Parameters
    ----------
    trained
        The run's model.
    prompts
        At least one; `on_text` takes one at a time.
    wish
        How.
    on_text
        Is told of each piece of an answer as it comes.
    """
    found: dict[int, str] = {}
    for state, rows in _by_state(trained, prompts):
        if state is not None:
            trained.become(state)
        written = answers_as_loaded(trained, [prompts[row] for row in rows], wish, on_text=on_text)
        found |= dict(zip(rows, written, strict=True))
    return [found[row] for row in range(len(prompts))]


def answers_as_loaded(
    trained: TrainedModel, prompts: Sequence[str], wish: Wish, *, on_text: Callable[[str], None] | None = None
) -> list[str]:
    """Answer prompts by the state that the model is set to, a batch at a time; see `answers`."""
    backbone, size = language_backbone(trained), trained.config.batch_size
    batches = [prompts[start : start + size] for start in range(0, len(prompts), size)]
    return [text for batch in batches for text in backbone.generate(batch, **asdict(wish), on_text=on_text)]


def answer_items(
    trained: TrainedModel, items: Iterator[Item], wish: Wish, *, on_text: Callable[[str], None] | None = None
) -> Iterator[tuple[Item, str]]:
    """Answer items in their order, a batch at a time, or one by one where `on_text` is told.

    Returns
    -------
    Each item with its answer, which is empty where the item has an error.
    """
    while batch := list(islice(items, 1 if on_text else trained.config.batch_size)):
        prompts = [str(item.raw) for item in batch if not item.error]
        written = iter(answers(trained, prompts, wish, on_text=on_text) if prompts else [])
        for item in batch:
            yield item, "" if item.error else next(written)


def _by_state(trained: TrainedModel, prompts: Sequence[str]) -> Iterator[tuple[GlobalState | None, list[int]]]:
    """Give the states that are needed, each with the numbers of its prompts; None: the one that is loaded."""
    if trained.routes is None:
        yield None, list(range(len(prompts)))
        return
    places = trained.place_for(trained.encode([Instruction(prompt) for prompt in prompts]))
    for place in sorted(set(places)):
        yield trained.routes.states[place], [row for row, one in enumerate(places) if one == place]
