"""Fed-TaLoRA's aggregation with the residual weight update (arXiv 2505.12318, ResWU), made exact.

The mean of products is not the product of means. With p_k = n_k / sum n and one scaling s, the server
broadcasts the means Bbar, Abar and adds what they lose to a residual that accumulates over the rounds:

    R_{t+1} = R_t + s * sum_k p_k (B_k - Bbar)(A_k - Abar)

so that ``W_0 + R_{t+1} + s Bbar Abar`` equals the weighted mean of the clients' effective weights
``W_0 + R_t + s B_k A_k``, for any subset of clients and any weights. The centred sum equals the paper's
``sum_k p_k B_k A_k - Bbar Abar`` and stays accurate where that difference of near-equal products cancels.

The step from R_t to R_{t+1} has rank (K-1) r. Where factors of that rank hold fewer numbers than the dense
matrix they are kept as such, and are what travels (see `Step`).

Clients of different rank are accepted: then the broadcast pair is the best approximation of the exact mean
at the server's rank (truncated SVD), and the step takes all that it leaves out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from fedtalora_flwr.aggregation.averaging import average_factors, mean_factors
from fedtalora_flwr.aggregation.class_rows import average_class_rows
from fedtalora_flwr.aggregation.factors import FACTORS, LoraFactors, Step, added, strongest
from fedtalora_flwr.aggregation.types import Aggregator, ClientUpdate, GlobalState, example_weights, in_summation_order

Residual = Literal["accumulate", "replace", "off"]


@dataclass(frozen=True)
class FedTaLoRA(Aggregator):
    """Average the factors by examples and carry what that loses in the residual.

    Parameters
    ----------
    residual
        ``accumulate``: exact in every round. ``replace``: the residual of the last round only, the literal
        reading of the paper. ``off``: none, plain FedAvg of the factors. The last two are ablations.
    residual_energy
        The share of a step's squared norm that is sent at least, in (0, 1]; what is left out is owed, and joins
        the next step. 1 sends all of it.
    trainable
        The factors that clients train; all share the others as broadcast.
    """

    residual: Residual = "accumulate"
    residual_energy: float = 1.0
    trainable: frozenset[str] = FACTORS

    @property
    def exact(self) -> bool:  # type: ignore[override]
        """Whether the aggregate equals FedAvg of the effective weights: nothing is dropped, or nothing is lost."""
        kept = self.residual == "accumulate" and self.residual_energy == 1
        return kept or len(self.trainable) == 1  # the mean is linear in one factor where all share the other

    def aggregate(self, state: GlobalState, updates: Sequence[ClientUpdate]) -> GlobalState:
        """Fold the updates into a new state (see the module's equation).

        Parameters
        ----------
        state
            What the clients started from.
        updates
            Replies of any subset of clients, in any order.

        Raises
        ------
        ValueError
            If there is no update, or the updates hold no example.
        """
        updates = in_summation_order(updates)
        weights = example_weights(updates)
        adapters: dict[str, LoraFactors] = {}
        residual: dict[str, Tensor] = {}
        steps: dict[str, Step] = {}
        owed: dict[str, Step] = {}
        for name, broadcast in state.adapters.items():
            factors = [update.adapters[name] for update in updates]
            if self.residual == "off":
                adapters[name] = mean_factors(factors, weights, like=broadcast)
                continue
            adapters[name], lost = average_factors(factors, weights, like=broadcast)
            if self.residual_energy < 1:
                lost, owed[name] = strongest(lost, owed=state.owed.get(name), energy=self.residual_energy)
            if self.residual == "replace":
                residual[name] = added(lost, to=None)
                continue
            residual[name] = added(lost, to=state.residual.get(name))
            if isinstance(lost, Step):
                steps[name] = lost
        return GlobalState(
            adapters=adapters,
            residual=residual,
            head=average_class_rows(state.head, updates),
            version=state.version + 1,
            step=steps,
            owed=owed,
        )


def create(*, residual: str = "accumulate", residual_energy: float = 1.0) -> FedTaLoRA:
    """Build the method from the settings ``residual`` and ``residual-energy``.

    Raises
    ------
    ValueError
        If `residual` is none of accumulate, replace, off, or `residual_energy` is not in (0, 1], or below 1
        without an accumulating residual.
    """
    if residual not in get_args(Residual):
        raise ValueError(f"residual must be one of {', '.join(get_args(Residual))}, got {residual!r}")
    if not 0 < residual_energy <= 1:
        raise ValueError(f"residual-energy must be in (0, 1], got {residual_energy}")
    if residual_energy < 1 and residual != "accumulate":
        raise ValueError(
            f"residual-energy below 1 owes the rest to later rounds: residual must be accumulate, got {residual!r}"
        )
    return FedTaLoRA(residual=residual, residual_energy=residual_energy)  # type: ignore[arg-type]
