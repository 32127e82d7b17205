"""A run's model as a folder for other programs: plain weights, or an adapter for PEFT.

Both say the same, ``W = W_0 + R + s B A`` of every adapted layer. ``merged`` writes W. ``peft`` leaves W_0 to the
untouched backbone and writes the change as LoRA factors: the run's own pair, followed by as much extra rank as the
residual R has, so that the adapter is exact, at the price of its size.

Every folder holds ``load.py``, a program that needs no fedtalora. An export is only put in place after that very
program has given the run's logits on random inputs, to 1e-5, or 1e-5 of the largest logit where that is above 1: the
computing is float32's, whose rounding grows with what is rounded.
"""

import json
import os
import runpy
import shutil
import string
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from fedtalora_flwr import __version__
from fedtalora_flwr.aggregation import Place, place_name
from fedtalora_flwr.config.joined import without_folders
from fedtalora_flwr.config.units import human_bytes
from fedtalora_flwr.config.whole import write_text
from fedtalora_flwr.data.instructions import Instruction
from fedtalora_flwr.inference.model import TrainedModel, open_trained
from fedtalora_flwr.inference.weight_delta import Change, changes_of
from fedtalora_flwr.model import backbones
from fedtalora_flwr.model.backbones import Backbone
from fedtalora_flwr.model.backbones.lm import LanguageBackbone
from fedtalora_flwr.model.private import privacy_of

KINDS = ("merged", "peft")
NUM_PROBES = 200
_TOLERANCE = 1e-5  # largest difference of a logit, as a share of the largest logit where that is above 1
_FACTS = "fedtalora.json"


class ExportError(ValueError):
    """An export that cannot be; the message says why and what to do instead."""


@dataclass(frozen=True)
class Exported:
    """What was written.

    Parameters
    ----------
    folder
        Where.
    standing
        How far the run had come.
    logit_difference
        Largest absolute difference between a logit of the export and of the run, over random inputs.
    largest_logit
        Of the run's on those inputs, by size.
    """

    folder: Path
    standing: str
    logit_difference: float
    largest_logit: float


def export(run: Path, *, to: str, target: Path | None = None, force: bool = False, place: Place = None) -> Exported:
    """Write the model of a run for use without fedtalora.

    Parameters
    ----------
    run
        Run folder, finished or not.
    to
        ``merged`` or ``peft``.
    target
        Folder to write, by default ``<run>/export/<to>``. It appears whole or not at all.
    force
        Replace an earlier export.
    place
        Of a run over slots, the cluster or slot whose model is written.

    Raises
    ------
    ExportError
        If the target exists, there is nothing to put in an adapter, no cluster of several is named, or the written
        model does not give the run's logits.
    ValueError, FileNotFoundError
        As `open_trained`.
    """
    if to not in KINDS:
        raise ExportError(f"an export is one of {', '.join(KINDS)}, got {to!r}")
    folder = (target or run / "export" / to).absolute()
    _check_target(folder, force=force)
    trained = open_trained(run, device="cpu", place=place)
    if trained.routes is not None:
        raise ExportError(f"{run} has {len(trained.routes.states)} models, one a cluster; export one by --cluster N")
    changes = changes_of(trained.model, trained.state)
    if to == "peft" and not changes:
        raise ExportError(f"{run} has no LoRA (lora-blocks = {trained.config.lora_blocks}); export it --to merged")
    with _replacing(folder) as part:
        facts = _write_model(part, trained, changes, to=to, final=folder)
        write_text(part / _FACTS, json.dumps(facts, indent=1) + "\n")
        write_text(part / "load.py", _filled(f"load_{facts['modality']}.py.j2", **facts))
        difference, largest = _logit_difference(part, trained)
        weights = sum(path.stat().st_size for path in part.rglob("*.safetensors"))
        measured = {"logit_difference": difference, "largest_logit": largest}
        card = _filled("export_card.md.j2", **facts, **measured, size=human_bytes(weights))
        write_text(part / "README.md", card)
        for path in part.rglob("*.safetensors"):  # written for their owner alone, whatever the umask
            path.chmod((part / "README.md").stat().st_mode)
        write_text(part / _FACTS, json.dumps({**facts, **measured}, indent=1) + "\n")
    return Exported(folder, trained.standing, difference, largest)


def _write_model(
    folder: Path, trained: TrainedModel, changes: dict[str, Change], *, to: str, final: Path
) -> dict[str, Any]:
    """Write weights and head, and give what is to be said of them; the folder is then moved to `final`."""
    config, backbone = trained.config, trained.model.backbone
    untouched = backbones.resolve(config.backbone, config.settings).float()
    writes = isinstance(untouched, LanguageBackbone)  # and needs no classes
    head = {} if writes else _head_tensors(trained)
    facts: dict[str, Any] = {
        "fedtalora_version": __version__,
        "to": to,
        "run": trained.record.name,
        "standing": trained.standing,
        "server_round": trained.server_round,
        "finished": trained.server_round >= trained.num_rounds,
        "method": config.method,
        "place": "" if trained.place is None else place_name(trained.place),
        "dataset": without_folders(config.dataset),
        "backbone": config.backbone,
        "modality": backbone.modality,
        "head": config.head,
        "privacy": privacy_of(config),
        "epsilon_spent": trained.record.epsilon_spent,
        "class_names": list(trained.class_names),
        "feature_norm": backbone.feature_norm,
        "random_features": head["projection"].shape[1] if "projection" in head else 0,
        "num_probes": NUM_PROBES,
        **backbone.preparation(),
    }
    if backbone.modality == "image":
        facts["image_side"] = trained.image_side
    else:
        facts["num_texts"] = list(trained.num_texts)
    if to == "merged":
        plain = "projection" not in head and backbone.feature_norm == "none"  # a classifier on the features as they are
        facts["head_inside"] = _write_merged(
            folder, untouched, changes, rows=head if plain else None, class_names=trained.class_names
        )
    else:
        facts |= _write_adapter(folder, untouched, changes, base=str(final / "base") if writes else "base")
        facts["head_inside"] = False
    facts["head_inside"] = facts["head_inside"] or writes
    if not facts["head_inside"]:
        save_file(head, folder / "head.safetensors")
    return facts


def _head_tensors(trained: TrainedModel) -> dict[str, Tensor]:
    """Take the classifier's rows of the known classes, and the projection of its random features if it has one."""
    known = torch.tensor(trained.classes)
    head = {name: value[known].contiguous() for name, value in trained.classifier.rows.items()}
    projection = trained.head.projection(trained.model.backbone.feature_dim)
    return head if projection is None else {**head, "projection": projection}


@torch.no_grad()
def _write_merged(
    folder: Path,
    backbone: Backbone,
    changes: dict[str, Change],
    *,
    rows: dict[str, Tensor] | None,
    class_names: Sequence[str],
) -> bool:
    """Write the backbone with W in place of W_0, and `rows` where it has a place for them: tell whether it has."""
    for name, change in changes.items():
        weight = backbone.model.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        weight.copy_(weight.double() + change.dense())
    return backbone.save(folder, class_names=class_names, rows=rows)


def _write_adapter(folder: Path, backbone: Backbone, changes: dict[str, Change], *, base: str) -> dict[str, Any]:
    """Write a PEFT adapter, and the untouched backbone beside it where no hub has that; it is to be found at `base`."""
    writes = isinstance(backbone, LanguageBackbone)
    transposed = backbone.transposed if isinstance(backbone, LanguageBackbone) else frozenset()
    pairs = {name: change.as_factors() for name, change in changes.items()}
    ranks = {name: pair.rank for name, pair in pairs.items()}
    LoraConfig(
        r=min(ranks.values()),  # a default that stands for no layer: the pattern names all
        target_modules=list(pairs),
        rank_pattern=ranks,
        alpha_pattern={name: pair.scaling * pair.rank for name, pair in pairs.items()},
        base_model_name_or_path=backbone.hub_name or base,
        task_type="CAUSAL_LM" if writes else None,
        fan_in_fan_out=bool(transposed.intersection(pairs)),
        inference_mode=True,
    ).save_pretrained(str(folder))
    tensors = {f"base_model.model.{name}.lora_A.weight": pair.lora_A for name, pair in pairs.items()}
    tensors |= {f"base_model.model.{name}.lora_B.weight": pair.lora_B for name, pair in pairs.items()}
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "adapter_model.safetensors")
    if backbone.hub_name is None:
        backbone.save(folder / "base")
    trained_ranks = {name: change.factors.rank for name, change in changes.items()}
    return {
        "base": backbone.hub_name,
        "ranks": ranks,
        "trained_ranks": trained_ranks,
        "extra_ranks": [ranks[name] - trained_ranks[name] for name in ranks],
    }


def _logit_difference(folder: Path, trained: TrainedModel) -> tuple[float, float]:
    """Compare the logits of the folder's own ``load.py`` with the run's on random inputs; also give their largest."""
    inputs = _probes(trained)
    wanted = _run_logits(trained, inputs)
    found = runpy.run_path(str(folder / "load.py"))["logits"](inputs)
    difference = float((found - wanted).abs().max())
    largest = float(wanted.abs().max())
    allowed = _TOLERANCE * max(1.0, largest)
    if not difference <= allowed:
        raise ExportError(
            f"the exported model's logits differ from the run's by up to {difference:.1e}, allowed is {allowed:.1e}; "
            f"nothing was written. A head whose lift is no projection cannot be exported; please report any other case"
        )
    return difference, largest


@torch.inference_mode()
def _run_logits(trained: TrainedModel, inputs: Sequence[Any]) -> Tensor:
    """Score the classes of inputs, or the first tokens of a language model's answers."""
    backbone = trained.model.backbone
    if isinstance(backbone, LanguageBackbone):
        return backbone.next_logits(trained.encode([Instruction(prompt) for prompt in inputs]))
    return trained.logits(trained.encode(inputs))


def _probes(trained: TrainedModel) -> list[Any]:
    """Draw noise: pictures of the run's size, or texts of letters, every other one a pair where the run has pairs."""
    rng = np.random.default_rng(0)
    side = trained.image_side
    if side is not None:
        return [
            PIL.Image.fromarray(pixels) for pixels in rng.integers(256, size=(NUM_PROBES, side, side, 3), dtype="u1")
        ]
    letters = np.array(list(string.ascii_lowercase))

    def text() -> str:
        return " ".join("".join(rng.choice(letters, 4)) for _ in range(rng.integers(1, 13)))

    numbers = trained.num_texts
    wanted = [numbers[probe % len(numbers)] for probe in range(NUM_PROBES)]
    return [text() if number == 1 else (text(), text()) for number in wanted]


def _filled(template: str, **values: Any) -> str:
    # Not HTML: nothing is to be escaped.
    loader = PackageLoader("fedtalora_flwr.report")
    environment = Environment(
        loader=loader, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    return environment.get_template(template).render(**values)


def _check_target(folder: Path, *, force: bool) -> None:
    """Refuse to write over what is there, and with force over anything but an export."""
    if not folder.exists():
        return
    if not force:
        raise ExportError(f"{folder} is there already; give another --out, or --force to replace it")
    if not (folder / _FACTS).is_file():
        raise ExportError(
            f"{folder} is no export (it has no {_FACTS}), so --force does not replace it; give another --out"
        )


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """Fill a folder beside the target, and put it in the target's place once it is whole."""
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        if folder.exists():
            folder.rename(old)
        part.rename(folder)
    except BaseException:
        if old.exists() and not folder.exists():  # between the two renames
            old.rename(folder)
        raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
