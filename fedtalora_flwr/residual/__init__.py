"""The versioned base: what is added to the frozen weights, the same on the server and on every client."""

from fedtalora_flwr.residual.base import ZERO, Base, Parcel
from fedtalora_flwr.residual.ledger import Ledger
from fedtalora_flwr.residual.slots import SlotLedger
from fedtalora_flwr.residual.store import BaseMissing, BaseStore

__all__ = ["ZERO", "Base", "BaseMissing", "BaseStore", "Ledger", "Parcel", "SlotLedger"]
