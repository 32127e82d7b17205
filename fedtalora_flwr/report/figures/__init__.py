"""Pictures of a run: each a pure function of arrays to a matplotlib figure, and `to_svg` to put it in a page.

Only this package imports matplotlib, and it never touches pyplot, so nothing global is left behind. The same
arrays give the same bytes. Text stays text: a reader can search it, and a browser sets it in its own font.
"""

from matplotlib.figure import Figure

from fedtalora_flwr.report.figures.accuracy import accuracy_matrix, accuracy_over_tasks
from fedtalora_flwr.report.figures.answers import answer_losses
from fedtalora_flwr.report.figures.cases import CaseRow, cases
from fedtalora_flwr.report.figures.classes import class_map, shows_classes
from fedtalora_flwr.report.figures.clusters import SlotMap, clusters
from fedtalora_flwr.report.figures.quality import calibration, class_accuracy, client_accuracy, confusion_matrix
from fedtalora_flwr.report.figures.rounds import (
    bytes_per_round,
    exactness_error,
    loss,
    residual_norm,
    seconds_per_round,
)
from fedtalora_flwr.report.figures.svg import to_file, to_svg

__all__ = [
    "CaseRow",
    "Figure",
    "SlotMap",
    "accuracy_matrix",
    "accuracy_over_tasks",
    "answer_losses",
    "bytes_per_round",
    "calibration",
    "cases",
    "class_accuracy",
    "class_map",
    "client_accuracy",
    "clusters",
    "confusion_matrix",
    "exactness_error",
    "loss",
    "residual_norm",
    "seconds_per_round",
    "shows_classes",
    "to_file",
    "to_svg",
]
