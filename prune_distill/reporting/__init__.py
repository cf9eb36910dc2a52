"""The report: what a run's folder contains, as tables, plots and a page. No torch."""

from typing import Any

# A JSON object as it was read from a run's folder. Any version of a stage may have written it: readers check what they
# take from it.
Json = dict[str, Any]
