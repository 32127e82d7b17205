"""Runs from Python: `run` plays one, `Run` is one that was played.

    import fedtalora_flwr as fedtalora

    run = fedtalora.run(settings={"num-tasks": 3}, out="runs/three")
    run.metrics["faa"], run.rounds["mean_loss"].iloc[-1]

What the command line says in an exit status is an exception here, and nothing is printed.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fedtalora_flwr.config import ConfigError, RunConfig, Scalar
from fedtalora_flwr.config.sources import app_folder, gather, preset_file
from fedtalora_flwr.launch.engine import ENGINES, Order, follow, gpu_share, prepare
from fedtalora_flwr.run_folder import names, round_lines
from fedtalora_flwr.run_folder.reader import RunRecord, read_run
from fedtalora_flwr.run_folder.resumed import resumed

if TYPE_CHECKING:
    import pandas as pd

    from fedtalora_flwr.inference.export import Exported
    from fedtalora_flwr.inference.model import TrainedModel


class RunError(RuntimeError):
    """A run that failed; the message says why, and `folder` holds what there is of it.

    Parameters
    ----------
    message
        Why.
    folder
        The run folder.
    """

    def __init__(self, message: str, *, folder: Path) -> None:
        super().__init__(message)
        self.folder = folder


@dataclass(frozen=True)
class Run:
    """A run by its folder, finished or not.

    Parameters
    ----------
    path
        The folder.
    """

    path: Path

    @classmethod
    def load(cls, path: str | Path) -> "Run":
        """Open a run folder.

        Raises
        ------
        FileNotFoundError
            If it is none.
        """
        run = cls(Path(path).resolve())
        assert run.record
        return run

    @cached_property
    def record(self) -> RunRecord:
        """What the folder says, as it was when first asked."""
        return read_run(self.path)

    @property
    def settings(self) -> dict[str, Scalar]:
        """All settings, by kebab-case key."""
        return dict(self.record.config)

    @property
    def state(self) -> str:
        """Either "complete", "failed" or "unfinished"."""
        return self.record.state

    @property
    def metrics(self) -> dict[str, Any]:
        """The result: ``metrics.json``; empty where the run is not finished."""
        return dict(self.record.metrics or {})

    @property
    def rounds(self) -> "pd.DataFrame":
        """A row for each finished round, indexed by ``server_round``; columns are those of ``rounds.jsonl``."""
        import pandas as pd

        lines = [dict(line) for line in self.record.rounds]
        return pd.DataFrame(lines or {"server_round": []}).set_index("server_round")

    @cached_property
    def model(self) -> "TrainedModel":
        """The model after the last finished round, on the device of the settings.

        Raises
        ------
        ValueError
            If the run has not come far enough to have one.
        """
        from fedtalora_flwr.inference.model import open_trained

        return open_trained(self.path)

    def predict(self, inputs: Sequence[Any], *, top: int = 3) -> list[list[tuple[str, float]]]:
        """Classify inputs with the run's model.

        Parameters
        ----------
        inputs
            Of a run on images: PIL images, or paths of image files. Of a run on texts: texts, or pairs (first, second)
            where it was trained on pairs.
        top
            Classes to name for each, at most.

        Returns
        -------
        For each input class names with their probabilities in [0, 1], the likeliest first.

        Raises
        ------
        InputError
            If an input cannot be read; the message names it.
        """
        from fedtalora_flwr.inference.predict import InputError, items_of, predict

        modality = self.model.model.backbone.modality
        if modality == "instruction":
            raise InputError(f"{self.path} is of a language model, which names no classes; let it answer: run.answer")
        items = items_of(inputs, modality=modality, num_texts=self.model.num_texts)
        found = list(predict(self.model, items, top=top))
        if bad := next((prediction.item for prediction in found if prediction.item.error), None):
            raise InputError(bad.error)
        return [list(prediction.ranking) for prediction in found]

    def answer(
        self, prompts: Sequence[str], *, max_new_tokens: int = 128, temperature: float = 0.0, seed: int = 0
    ) -> list[str]:
        """Let the run's language model answer.

        Parameters
        ----------
        prompts
            At least one.
        max_new_tokens
            Of an answer, at most.
        temperature
            0 takes the likeliest token each time.
        seed
            Of the draws, with a temperature.

        Raises
        ------
        ValueError
            If the run's model classifies and writes nothing.
        """
        from fedtalora_flwr.inference.answer import Wish, answers

        return answers(self.model, prompts, Wish(max_new_tokens, temperature, seed))

    def report(self) -> Path:
        """Write ``report.html`` into the folder, one file that opens offline, and give its path."""
        from fedtalora_flwr.report import write_report

        return write_report(self.path)

    def export(
        self, to: Literal["merged", "peft"] = "merged", *, out: str | Path | None = None, force: bool = False
    ) -> "Exported":
        """Write the model for use without fedtalora, as ``fedtalora export`` does.

        Parameters
        ----------
        to
            Plain weights, or an adapter for PEFT.
        out
            Folder to write; by default ``export/merged`` or ``export/peft`` in the run folder.
        force
            Replace an earlier export in that folder.
        """
        from fedtalora_flwr.inference.export import export

        return export(self.path, to=to, target=Path(out) if out else None, force=force)


def run(
    *,
    preset: str = "",
    settings: Mapping[str, Scalar] | None = None,
    out: str | Path | None = None,
    engine: str = "process",
    on_round: Callable[[dict[str, Any]], None] | None = None,
    resume: str | Path | None = None,
) -> Run:
    """Play a run to its end: without arguments the demo, scikit-learn's digits over five clients.

    Parameters
    ----------
    preset
        Name of a preset; `fedtalora presets` lists them.
    settings
        Settings by kebab-case key, over those of the preset.
    out
        Run folder; by default ``runs/<name>-<time>``.
    engine
        ``process``: clients take turns in one process. ``ray``: Flower's simulation, side by side.
    on_round
        Is called with each round's line of ``rounds.jsonl``, in their order, as they are there. An exception of its
        own stops the run, and goes through.
    resume
        Folder of a stopped run to go on with, instead of `preset` and `out`; `settings` may then only say where and
        how it is carried out.

    Raises
    ------
    ConfigError
        If a setting cannot be; nothing was started then.
    RunError
        If the run fails.
    """
    app = app_folder()
    if engine not in ENGINES:
        raise ConfigError(f"engine is one of {', '.join(ENGINES)}, got {engine!r}")
    if resume is not None:
        if preset or out:
            raise ConfigError("resume goes on with the run's own settings; give no preset and no out")
        folder = Path(resume).resolve()
        assignments = [f"{key}={json.dumps(value)}" for key, value in (settings or {}).items()]
        values = resumed(app, folder, assignments=assignments)
    else:
        values = gather(app, file=preset_file(app, preset) if preset else None, assignments=[], values=settings)
        name = preset or str(values["dataset"]).partition(":")[0].replace("/", "-")
        folder = Path(out or str(values["out"]) or f"runs/{name}-{datetime.now():%Y%m%d-%H%M%S}").resolve()
        if names.standing(folder) != "nothing":
            raise ConfigError(f"{folder} holds a run already; choose another out, or go on with it by resume")
    config = RunConfig.parse(values | {"out": str(folder)})
    tick = _Teller(folder, on_round)
    played = follow(
        Order(
            app,
            prepare(config),
            folder / "logs",
            engine=engine,
            num_clients=config.num_clients,
            client_cpus=config.threads,
            client_gpus=gpu_share(-1.0, device=config.device),
        ),
        tick,
    )
    if not played.ok:
        raise RunError(_failure(folder) or played.details, folder=folder)
    return Run.load(folder)


class _Teller:
    """Tells of rounds that have come since the last look."""

    def __init__(self, folder: Path, on_round: Callable[[dict[str, Any]], None] | None) -> None:
        self._path, self._on_round = folder / names.ROUNDS, on_round
        # By what they say and not by their number: a run that goes on from an earlier round drops the lines after it.
        self._told = {line.raw for line in self._lines()}

    def __call__(self) -> None:
        for line in self._lines():
            if line.raw not in self._told:
                self._told.add(line.raw)
                assert self._on_round is not None
                self._on_round(dict(line.values))

    def _lines(self) -> list[round_lines.Line]:
        return round_lines.read(self._path)[0] if self._on_round and self._path.exists() else []


def _failure(folder: Path) -> str:
    """Give what the run said of its failure, if it came to say so."""
    with suppress(OSError, ValueError):
        status = json.loads((folder / names.STATUS).read_text())
        if status.get("phase") == "failed":
            return str(status["message"])
    return ""
