"""The report: the paper's claims, the measured numbers, verdicts, tables, and the HTML page."""
