"""Many runs from one file: every combination of a grid, for every seed, side by side within the machine."""

from fedtalora_flwr.launch.sweep.plan import Plan, PlannedRun, narrowed, read_plan
from fedtalora_flwr.launch.sweep.play import Outcome, Watch, play_all, side_by_side, standing

__all__ = ["Outcome", "Plan", "PlannedRun", "Watch", "narrowed", "play_all", "read_plan", "side_by_side", "standing"]
