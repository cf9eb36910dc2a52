"""python -m recipes STAGE --config RUN_DIR/resolved.yaml
torchrun --nproc_per_node 8 -m recipes STAGE --config RUN_DIR/resolved.yaml

Run one stage of a run from its resolved config. The stage's inputs must be complete.

Only light modules are imported at the top, because helpers that multiprocessing spawns import this module again. A
stage's module, and NeMo with it, is imported after the stage's inputs are checked.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import cast

from prune_distill.nemo import backend
from prune_distill.pipeline.processes import import_libraries
from prune_distill.pipeline.run_arguments import StageModule
from prune_distill.pipeline.stage import Stage
from prune_distill.pipeline.stage_main import stage_main
from prune_distill.pipeline.stages import STAGES


def load_stage(stage: Stage) -> StageModule:
    """Import a stage's module, after activating the backend if the module needs NeMo."""
    if stage.needs_nemo:
        backend.activate()
    import_libraries(stage.module)
    return cast(StageModule, sys.modules[stage.module])


def main(load: Callable[[Stage], StageModule] = load_stage) -> None:
    """Run the stage that the command line names.

    Args:
        load: imports and returns a stage's module.
    """
    command, _, description = (__doc__ or "").partition("\n\n")
    names = textwrap.fill(", ".join(stage.name for stage in STAGES), 100, break_on_hyphens=False)
    parser = argparse.ArgumentParser(
        prog="python -m recipes",
        usage=command.replace("\n", "\n       "),
        description=description.partition("\n\n")[0],
        epilog=f"stages:\n{textwrap.indent(names, '  ')}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("stage", metavar="STAGE", help="the stage's name; a variant has its own, such as distill.ce")
    parser.add_argument("--config", required=True, type=Path, help="the run's resolved config")
    args = parser.parse_args()
    stage_main(args.stage, args.config, load)


if __name__ == "__main__":
    # In spawned helpers, multiprocessing only imports a package's `__main__.py` if it is known by its path
    # (multiprocessing/spawn.py: get_preparation_data, _fixup_main_from_name). Helpers must import it so that they exit
    # with this process (the last lines of `prune_distill/pipeline/stage_main.py`).
    __spec__ = None
    main()
