"""The report: what a run's folder holds, as tables, plots and a page. No torch."""
