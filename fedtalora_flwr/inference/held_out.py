"""How well a run's language model does on what it has held out: its answers, scored, and the loss of the expected ones.

The score is ROUGE-L (Lin, 2004), the share of words in the longest common subsequence of an answer and the one that was
expected, as an F-measure in [0, 1]; and whatever a command of the user's says of each answer.
"""

import json
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fedtalora_flwr.aggregation import GlobalState
from fedtalora_flwr.config.whole import write_text
from fedtalora_flwr.data.instructions import Instruction
from fedtalora_flwr.inference.answer import AnswerError, Wish, answers, answers_as_loaded, language_backbone
from fedtalora_flwr.inference.model import TrainedModel
from fedtalora_flwr.model.session import data_of, test_examples
from fedtalora_flwr.model.train import Examples, score
from fedtalora_flwr.run_folder import names


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
        with _untouched(trained):
            before = answers_as_loaded(trained, [example.prompt for example in examples], wish)
        for name, example, was, now in zip(classes, examples, before, after, strict=True):
            scores = [rouge(example.answer, text) for text in (was, now)]
            found.append(Answered(task_id, name, example.prompt, example.answer, was, now, *scores))
    return found


@dataclass(frozen=True)
class Loss:
    """The mean cross-entropy of a token of a task's test answers, in nats: of the untouched model, and of the run's."""

    before: float
    after: float


def held_out_losses(trained: TrainedModel) -> dict[int, Loss]:
    """Measure the loss on all test answers of every task that was trained, by task id."""
    tests = {task_id: test_examples(trained.config, task_id=task_id) for task_id in range(_tasks_begun(trained))}
    after = {task_id: _loss(trained, examples) for task_id, examples in tests.items()}
    with _untouched(trained):
        before = {task_id: _summed(trained, [examples]) for task_id, examples in tests.items()}
    return {task_id: Loss(before[task_id], after[task_id]) for task_id in tests}


def _loss(trained: TrainedModel, examples: Examples) -> float:
    """Give the loss under the run's model; in a run with clusters that of each prompt's own."""
    if trained.routes is None:
        return _summed(trained, [examples])
    places, parts = torch.tensor(trained.place_for(examples.inputs)), []
    for place in sorted(set(places.tolist())):
        here = places == place
        parts.append((trained.routes.states[place], Examples(examples.inputs[here], examples.labels[here])))
    return _summed(trained, [part for _, part in parts], states=[state for state, _ in parts])


def _summed(trained: TrainedModel, parts: Sequence[Examples], *, states: Sequence[GlobalState] = ()) -> float:
    """Give the mean loss over parts, each under its state if states are given, else under what is loaded."""
    found = []
    for index, part in enumerate(parts):
        if states:
            trained.become(states[index])
        found.append(score(trained.model, [], part, classes=[], config=trained.config))
    return sum(one.loss_sum or 0.0 for one in found) / sum(one.total for one in found)


def _tasks_begun(trained: TrainedModel) -> int:
    """Count the tasks that were trained so far; a run over slots trains all at once."""
    if trained.routes is not None or trained.place is not None:
        return trained.config.last_task
    per_task = max(1, trained.config.rounds_per_task)
    return min(trained.config.last_task, -(-trained.server_round // per_task))


@contextmanager
def _untouched(trained: TrainedModel) -> Iterator[None]:
    """Set the model to what it was before any training, for a while."""
    trained.model.load(trained.model.initial_factors(seed=trained.config.seed), {})
    try:
        yield
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
    return [replace(one, score=score) for one, score in zip(found, scores, strict=True)]


def by_task(found: Sequence[Answered], losses: Mapping[int, Loss]) -> list[dict[str, Any]]:
    """Give the means of each task: loss of a token, ROUGE-L before and after, the command's score."""
    means = []
    for task_id in sorted({one.task_id for one in found}):
        here = [one for one in found if one.task_id == task_id]
        scores = [one.score for one in here if one.score is not None]
        means.append(
            {
                "task_id": task_id,
                "classes": sorted({one.class_name for one in here}),
                "loss_before": losses[task_id].before,
                "loss": losses[task_id].after,
                "num_answers": len(here),
                "rouge_l_before": sum(one.rouge_before for one in here) / len(here),
                "rouge_l": sum(one.rouge_after for one in here) / len(here),
                **({"score": sum(scores) / len(scores)} if scores else {}),
            }
        )
    return means


def write_answers(run: Path, found: Sequence[Answered], losses: Mapping[int, Loss], wish: Wish) -> Path:
    """Write ``answers.json`` into a run folder: the means by task, every answer, and how they were written."""
    path = run / names.ANSWERS
    content = {"wish": asdict(wish), "tasks": by_task(found, losses), "answers": [asdict(one) for one in found]}
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    return path
