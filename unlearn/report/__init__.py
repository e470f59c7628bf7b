"""
The report of a run: the paper's tables and figures with our numbers beside its own, and what the paper leaves out.

`records` holds every number, `run_folder`, `evaluations` and `probes` read them, `comparisons` and `reading` compare
them, `paper_tables`, `measure_tables`, `figures` and `heat_maps` show them, and `sections` puts them in order.
"""

from .write import write_report


__all__ = ["write_report"]
