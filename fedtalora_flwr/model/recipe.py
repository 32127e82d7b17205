"""The recipe of local training: optimiser, learning rates over the steps of a task, and the bound on a step.

Of a task's steps the first ``warmup`` share raises the rates linearly, and ``lr-schedule`` lowers them from there on:

    rate(t) = peak * min(1, t / warmup) * (cosine: (1 + cos(pi t)) / 2, constant: 1),   t in (0, 1)

t is the middle of a step, as a share of the task's rounds, so that a client with few steps does not begin with a rate
of 0. A client keeps no state between rounds: the optimiser is fresh in each, the rates go on.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fedtalora_flwr.config import RunConfig


class Recipe:
    """Takes the steps of one client's round.

    Parameters
    ----------
    lora, rows
        What is trained: the factors of the pairs, and the class rows.
    config
        Optimiser, peak rates, schedule, warm-up and the bound on the gradient's norm.
    task_id, round_in_task
        The server's clock, from 0.
    num_steps
        Steps of this round.
    """

    def __init__(
        self,
        lora: Sequence[nn.Parameter],
        rows: Sequence[nn.Parameter],
        *,
        config: RunConfig,
        task_id: int,
        round_in_task: int,
        num_steps: int,
    ) -> None:
        self._lora, self._config = list(lora), config
        self._round, self._num_steps, self._step = round_in_task, num_steps, 0
        later = config.later_learning_rate if task_id > 0 else 1.0
        groups = [
            {"params": self._lora, "lr": config.learning_rate * later},
            {"params": list(rows), "lr": config.head_learning_rate},
        ]
        groups = [{**group, "peak": group["lr"]} for group in groups if group["params"]]
        self._optimizer: torch.optim.Optimizer
        if config.optimizer == "sgd":
            self._optimizer = torch.optim.SGD(
                groups, momentum=config.momentum, weight_decay=config.weight_decay, foreach=True
            )
        else:
            self._optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay, foreach=True)

    def step(self, loss: Tensor) -> None:
        """Follow the gradient of `loss`, a scalar, by one step."""
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.follow()

    def follow(self) -> None:
        """Follow the gradients that the parameters hold by one step."""
        share = self._share()
        for group in self._optimizer.param_groups:
            group["lr"] = share * group["peak"]
        if self._config.clip_norm and self._lora:
            nn.utils.clip_grad_norm_(self._lora, self._config.clip_norm, foreach=True)
        self._optimizer.step()
        self._step += 1

    def _share(self) -> float:
        """Give the share of the peak rates that the current step has."""
        config = self._config
        progress = (self._round + (self._step + 0.5) / self._num_steps) / config.rounds_per_task
        share = min(1.0, progress / config.warmup) if config.warmup else 1.0
        if config.lr_schedule == "cosine":
            share *= 0.5 * (1 + math.cos(math.pi * progress))
        return share
