"""Read a run folder and show it: one HTML file that opens offline, tables in a terminal, runs side by side.

A run may have stopped anywhere, so everything but ``config.json`` may be missing; what is there is shown.
Tasks count from 1 on a page and in a table, from 0 in the files.
"""

from fedtalora_flwr.report.comparison import Comparison, compare
from fedtalora_flwr.report.holdings import data_table, write_data_page
from fedtalora_flwr.report.page import write_report
from fedtalora_flwr.report.quality import evaluation_tables, write_evaluation
from fedtalora_flwr.report.study import Study, study, study_table, write_study
from fedtalora_flwr.report.terminal import print_table
from fedtalora_flwr.run_folder.reader import RunRecord, read_run

__all__ = [
    "Comparison",
    "RunRecord",
    "Study",
    "compare",
    "data_table",
    "evaluation_tables",
    "print_table",
    "read_run",
    "study",
    "study_table",
    "write_data_page",
    "write_evaluation",
    "write_report",
    "write_study",
]
