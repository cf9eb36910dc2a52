"""python -m recipes.report RUN_DIR [RUN_DIR ...] [--out FOLDER]

Report the results of a run, for people (`report/index.html`, one file without external resources) and programs
(`report.json`), at any time: it shows the available results, and what is missing or failed. The model cards of the
students, with these results, are in `report/cards`. For several runs, or the folder of a sweep, write a comparison. As
the last stage: python -m recipes report --config RUN_DIR/resolved.yaml
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from prune_distill.errors import InputError
from prune_distill.pipeline.artifact import find_runs, read_manifest, update_record, write_json
from prune_distill.pipeline.names import MANIFEST, REPORT, REPORT_JSON, REPORT_PAGE
from prune_distill.pipeline.run_arguments import Metrics
from prune_distill.reporting import comparison, html, model_cards, run_page
from prune_distill.reporting.privacy import Privacy
from prune_distill.reporting.results import Report, summarize
from prune_distill.reporting.run_folder import RunFolder, locate_report, read_run, stage_run_folder
from prune_distill.reporting.words import strict
from prune_distill.schema import RunConfig


@dataclass(frozen=True)
class Inputs:
    """The folders of all other stages, by name."""

    stages: dict[str, Path]


def run(cfg: RunConfig, inputs: Inputs, out: Path) -> Metrics:
    """Output: `report.json`, `index.html`, `cards/NAME.md`."""
    report, _ = write_report(stage_run_folder(cfg, inputs.stages), out)
    return {name: model["val_loss"] for name, model in report["models"].items()}


def write_report(found: RunFolder, out: Path) -> tuple[Report, list[str]]:
    """Write the report of one run, and return the content of `report.json` and the names of all files."""
    privacy = Privacy((found.path,))
    report: Report = privacy.value(strict(summarize(found)))
    html.write(run_page.page(found, report, privacy.text), out / REPORT_PAGE, privacy)
    write_json(out / REPORT_JSON, report)
    return report, [REPORT_JSON, REPORT_PAGE, *model_cards.write(found, report, out, privacy.text)]


def write_comparison(paths: Sequence[Path], out: Path) -> None:
    """Write the comparison of several runs; `report.json` contains their reports by name."""
    privacy = Privacy(tuple(paths))
    runs = comparison.name_runs([read_run(path) for path in paths])
    reports = {name: privacy.value(strict(summarize(found))) for name, found in runs.items()}
    html.write(comparison.page(runs, reports, privacy.text), out / REPORT_PAGE, privacy)
    write_json(out / REPORT_JSON, {"runs": reports})


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line, for runs in any state. Returns the exit status: 0, or 2 if there is nothing to show."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.report", description=(__doc__ or "").partition("\n")[2].strip()
    )
    parser.add_argument("run_dirs", nargs="+", type=Path, metavar="RUN_DIR", help="folder of a run or of a sweep")
    parser.add_argument("--out", type=Path, help="the report's folder (one run: RUN_DIR/report; several: comparison)")
    args = parser.parse_args(arguments)
    try:
        paths = [path for folder in args.run_dirs for path in find_runs(folder)]
        if len(paths) == 1:
            out = args.out or paths[0] / REPORT
            found = read_run(paths[0])
            _withdraw(found, out)
            _, files = write_report(found, out)
            update_record(out, files)
        else:
            out = args.out or Path("comparison" if len(args.run_dirs) > 1 else args.run_dirs[0] / REPORT)
            write_comparison(paths, out)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: the report cannot be written ({error}); set --out to a writable folder", file=sys.stderr)
        return 2
    print(f"report: {out / REPORT_PAGE}")
    return 0


def _withdraw(found: RunFolder, out: Path) -> None:
    """Remove the manifest of a report that is about to be overwritten at another state of the run, so that the end of
    the run writes it again."""
    manifest = read_manifest(out)
    located = locate_report(found.cfg) if found.cfg is not None else None
    ended = located is not None and all(stage.complete for stage in found.stages.values())
    if manifest is not None and (not ended or located is None or manifest.get("config_hash") != located.config_hash):
        (out / MANIFEST).unlink()


if __name__ == "__main__":
    sys.exit(main())
