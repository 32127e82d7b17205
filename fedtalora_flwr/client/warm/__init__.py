"""A process of the node that stays from message to message, with its libraries, model and data in memory.

In a deployment Flower starts a process for each message, which would load all that anew. That process stays thin
instead: it imports nothing but Flower and Python's own modules, and has the work done by the node's warm process
(`call`), which the node's first message starts. Whatever is wrong with that one, the message is handled in its own
process: slower, with the same result.
"""

from fedtalora_flwr.client.warm.caller import call
from fedtalora_flwr.client.warm.task import Task

__all__ = ["Task", "call"]
