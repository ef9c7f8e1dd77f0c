"""report.html of a run: what happened, as words, curves, tables and a map, in one file that needs no network.

    run_data -> what the run left on disk, read leniently
    story, curves, texts, candidate_map -> sections
    page -> the file

It can be written at any time, also of a run that is still going or was killed.
"""

from ampo_fast.report.page import write_report, write_stage_page

__all__ = ["write_report", "write_stage_page"]
