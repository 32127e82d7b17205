"""The versioned base: what is added to the frozen weights, the same on the server and on every client."""

from fedtalora_flwr.residual.ledger import Ledger
from fedtalora_flwr.residual.slots import SlotLedger
from fedtalora_flwr.residual.store import VersionMissing, VersionStore
from fedtalora_flwr.residual.version import ZERO, Patch, ResidualVersion

__all__ = ["ZERO", "Ledger", "Patch", "ResidualVersion", "SlotLedger", "VersionMissing", "VersionStore"]
