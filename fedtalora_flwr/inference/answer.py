"""Let a run's language model answer: prompts of a user, or those that a run has held out, scored against the answers.

The score is ROUGE-L (Lin, 2004), the share of words in the longest common subsequence of an answer and the one that was
expected, as an F-measure in [0, 1]; and whatever a command of the user's says of each answer.
"""

import json
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from fedtalora_flwr.aggregation import GlobalState
from fedtalora_flwr.config.whole import write_text
from fedtalora_flwr.data.instructions import Instruction
from fedtalora_flwr.inference.model import TrainedModel
from fedtalora_flwr.inference.predict import Item
from fedtalora_flwr.model.backbones.lm import LanguageBackbone
from fedtalora_flwr.model.session import data_of
from fedtalora_flwr.run_folder import names


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


@dataclass(frozen=True)
class Answered:
    """A prompt of a task that nobody was trained on, and what became of it.

    Parameters
    ----------
    task_id, class_name
        Where the prompt is from.
    prompt, expected
        As the data have them.
    before, after
        What the untouched model answers, and the run's.
    rouge_before, rouge_after
        Their ROUGE-L, in [0, 1].
    score
        What the user's command says of `after`; None without one.
    """

    task_id: int
    class_name: str
    prompt: str
    expected: str
    before: str
    after: str
    rouge_before: float
    rouge_after: float
    score: float | None = None


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
    backbone = language_backbone(trained)
    found: dict[int, str] = {}
    for state, rows in _by_state(trained, prompts):
        if state is not None:
            trained.become(state)
        for batch in torch.tensor(rows).split(trained.config.batch_size):  # type: ignore[no-untyped-call]
            chosen = batch.tolist()
            written = backbone.generate([prompts[row] for row in chosen], **asdict(wish), on_text=on_text)
            found |= dict(zip(chosen, written, strict=True))
    return [found[row] for row in range(len(prompts))]


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


def held_out_answers(
    trained: TrainedModel, wish: Wish, *, each: int, on_task: Callable[[str], None] = lambda name: None
) -> list[Answered]:
    """Answer the first test prompts of every task that was trained, before and after.

    Parameters
    ----------
    trained
        The run's model; its data are read again.
    wish
        How.
    each
        Prompts of a task.
    on_task
        Is told of each task as it begins.

    Raises
    ------
    AnswerError
        If the run is on no language model, or ROUGE-L's package is missing.
    ValueError
        If the data cannot be read.
    """
    rouge = _rouge_l()
    language_backbone(trained)
    data = data_of(trained.config)
    found: list[Answered] = []
    for task_id in range(_tasks_begun(trained)):
        rows = data.stream.test_rows(data.source.test.labels, task_id)[:each]
        classes = [data.source.class_names[label] for label in data.source.test.labels[rows]]
        on_task(", ".join(dict.fromkeys(classes)))
        examples: Sequence[Instruction] = data.source.test.read(rows)
        after = answers(trained, [example.prompt for example in examples], wish)
        before = _untouched_answers(trained, [example.prompt for example in examples], wish)
        for name, example, was, now in zip(classes, examples, before, after, strict=True):
            scores = [rouge(example.answer, text) for text in (was, now)]
            found.append(Answered(task_id, name, example.prompt, example.answer, was, now, *scores))
    return found


def _tasks_begun(trained: TrainedModel) -> int:
    """Count the tasks that were trained so far; a run over slots trains all at once."""
    if trained.routes is not None or trained.place is not None:
        return trained.config.last_task
    per_task = max(1, trained.config.rounds_per_task)
    return min(trained.config.last_task, -(-trained.server_round // per_task))


def _untouched_answers(trained: TrainedModel, prompts: Sequence[str], wish: Wish) -> list[str]:
    """Answer with the model as it was before any training."""
    trained.model.load(trained.model.initial_factors(seed=trained.config.seed), {})
    try:
        return [
            text
            for batch in torch.arange(len(prompts)).split(trained.config.batch_size)  # type: ignore[no-untyped-call]
            for text in language_backbone(trained).generate([prompts[row] for row in batch.tolist()], **asdict(wish))
        ]
    finally:
        trained.become(trained.state)


def _rouge_l() -> Callable[[str, str], float]:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ModuleNotFoundError:
        raise AnswerError("ROUGE-L needs the package rouge-score: pip install 'fedtalora[lm]'") from None
    scorer = RougeScorer(["rougeL"])
    return lambda expected, found: float(scorer.score(expected, found)["rougeL"].fmeasure)


def scored_by(command: str, found: Sequence[Answered]) -> list[Answered]:
    """Let a command of the user's score the answers.

    Parameters
    ----------
    command
        For the shell. It reads a JSON object a line (task, prompt, expected, answer), and prints a number a line.
    found
        The answers.

    Raises
    ------
    AnswerError
        If the command fails, or does not print a number for each answer.
    """
    lines = [
        json.dumps({"task": a.class_name, "prompt": a.prompt, "expected": a.expected, "answer": a.after}) for a in found
    ]
    done = subprocess.run(command, shell=True, input="\n".join(lines) + "\n", capture_output=True, text=True)
    if done.returncode:
        raise AnswerError(
            f"{command!r} ended with {done.returncode}: {done.stderr.strip()[-300:] or 'it said nothing'}"
        )
    printed = done.stdout.split()
    try:
        scores = [float(number) for number in printed]
    except ValueError as error:
        raise AnswerError(f"{command!r} must print a number a line: {error}") from None
    if len(scores) != len(found):
        raise AnswerError(
            f"{command!r} printed {len(scores)} numbers for {len(found)} answers; it must print one a line"
        )
    return [Answered(**{**asdict(one), "score": score}) for one, score in zip(found, scores, strict=True)]


def by_task(found: Sequence[Answered]) -> list[dict[str, Any]]:
    """Give the means of each task: number of answers, ROUGE-L before and after, the command's score."""
    means = []
    for task_id in sorted({one.task_id for one in found}):
        here = [one for one in found if one.task_id == task_id]
        scores = [one.score for one in here if one.score is not None]
        means.append(
            {
                "task_id": task_id,
                "classes": sorted({one.class_name for one in here}),
                "num_answers": len(here),
                "rouge_l_before": sum(one.rouge_before for one in here) / len(here),
                "rouge_l": sum(one.rouge_after for one in here) / len(here),
                **({"score": sum(scores) / len(scores)} if scores else {}),
            }
        )
    return means


def write_answers(run: Path, found: Sequence[Answered], wish: Wish) -> Path:
    """Write ``answers.json`` into a run folder: the means by task, every answer, and how they were written."""
    path = run / names.ANSWERS
    content = {"wish": asdict(wish), "tasks": by_task(found), "answers": [asdict(one) for one in found]}
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    return path
