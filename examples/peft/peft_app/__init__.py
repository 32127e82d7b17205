"""A Flower app whose strategy is FedAvg or FedTaLoRA."""
