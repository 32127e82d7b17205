"""The server: Flower's own loop with the strategy that the settings name."""

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from fedtalora_flwr.strategy import FedTaLoRA, get_arrays
from peft_app.exactness import Measured
from peft_app.models import build

app = ServerApp()
STRATEGIES = {strategy.__name__: strategy for strategy in (FedAvg, FedTaLoRA)}


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds and print how exact each was."""
    name, kind = str(context.run_config["strategy"]), str(context.run_config["model"])
    strategy = type(name, (Measured, STRATEGIES[name]), {"kind": kind})()
    result = strategy.start(grid, get_arrays(build(kind)), num_rounds=int(context.run_config["num-rounds"]))
    for server_round, metrics in result.train_metrics_clientapp.items():
        print(f"{name} {kind} round {server_round}: exactness error {metrics['exactness-error']:.1e}", flush=True)
