"""A page of all runs below a folder, as they go: served here, made of run folders alone.

Whoever wrote them, `fedtalora run`, Flower's own command, a sweep or a deployment: nothing is asked of a run, and
nothing is written.
"""

from fedtalora_flwr.report.live.app import live_app
from fedtalora_flwr.report.live.runs import Board

__all__ = ["Board", "live_app"]
