"""Turns results into a folder under `reports/`: saves the data, then draws pages and figures from that data alone.

The same result gives the same bytes; a saved run can be drawn again, or beside another. matplotlib's only door is
`report.figures`.
"""

from hybridsd_sim.report.folder import compare_reports, draw_report, run_id, write_report

__all__ = ["compare_reports", "draw_report", "run_id", "write_report"]
