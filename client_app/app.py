"""The messages that a node answers.

The work is in `fedtalora_flwr.client.handlers`, which this process may never import: a warm one has it loaded.
"""

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedtalora_flwr.client import warm

app = ClientApp()


@app.query()
def hello(message: Message, context: Context) -> Message:
    """Say which partition this node holds, and what of it."""
    return _answer("hello", message, context)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train on this node's data of the task."""
    return _answer("train", message, context)


@app.train("slots")
def slots(message: Message, context: Context) -> Message:
    """Train all of this node's slots."""
    return _answer("slots", message, context)


@app.train("slot_sums")
def slot_sums(message: Message, context: Context) -> Message:
    """Sum this node's features over its slots."""
    return _answer("slot_sums", message, context)


@app.train("sums")
def sums(message: Message, context: Context) -> Message:
    """Sum this node's features of the task."""
    return _answer("sums", message, context)


@app.train("means")
def means(message: Message, context: Context) -> Message:
    """Sum this node's features of the task by class."""
    return _answer("means", message, context)


@app.train("fisher")
def fisher(message: Message, context: Context) -> Message:
    """Sum the squared gradients of this node's data of the task."""
    return _answer("fisher", message, context)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Count the hits on what this node has held out of the tasks so far."""
    return _answer("evaluate", message, context)


def _answer(handler: str, message: Message, context: Context) -> Message:
    """Have a message handled: in the node's warm process, or here if the node's config has no ``warm=true``."""
    task = warm.Task("fedtalora_flwr.client.handlers", handler, (message, context.run_config, context.node_config))
    content = warm.call(task, run_id=context.run_id) if context.node_config.get("warm") else task.run()
    return Message(content, reply_to=message)
