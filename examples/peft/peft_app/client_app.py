"""The client: load what came, train, give the arrays back. It is the same for either strategy."""

import torch
from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedtalora_flwr.strategy import get_arrays, set_arrays
from peft_app.models import batch, build

app = ClientApp()
STEPS, LEARNING_RATE = 20, 0.01


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train on this client's texts."""
    model, partition_id = build(str(context.run_config["model"])), int(context.node_config["partition-id"])
    set_arrays(model, message.content["arrays"])
    texts = batch(str(context.run_config["model"]), partition_id)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
    model.train()
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = model(**texts).loss
        loss.backward()
        optimizer.step()
    metrics = MetricRecord({"num-examples": 10 * (1 + partition_id), "loss": loss.item()})
    return Message(RecordDict({"arrays": get_arrays(model), "metrics": metrics}), reply_to=message)


@app.evaluate()
@torch.no_grad()
def evaluate(message: Message, context: Context) -> Message:
    """Compute the loss on this client's texts."""
    kind = str(context.run_config["model"])
    model = build(kind).eval()
    set_arrays(model, message.content["arrays"])
    texts = batch(kind, int(context.node_config["partition-id"]))
    metrics = MetricRecord({"num-examples": len(texts["labels"]), "loss": model(**texts).loss.item()})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)
