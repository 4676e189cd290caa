"""Reports: PNG plots and one self-contained HTML page of one or several runs."""

from lemo.report.page import write_report
from lemo.report.run import KeptMap, Run, load_run

__all__ = ["KeptMap", "Run", "load_run", "write_report"]
