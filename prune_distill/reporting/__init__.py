"""Report of a run: reads the run's folder and writes tables, plots and a page. No torch."""

from typing import Any

# A JSON object from a run's folder. Any version of a stage may have written it, so readers check the values that they
# use.
Json = dict[str, Any]
