"""python -m tests.helpers.harness_directly MODEL_FOLDER TASK_FOLDER TASK BATCH_SIZE

Prints the results of EleutherAI's harness for a task, which loads the model itself, as JSON on the last line.
"""

from __future__ import annotations

import json
import os
import sys


def main() -> None:
    model, folder, task, batch_size = sys.argv[1:]
    os.chdir(folder)
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=folder, include_defaults=False)
    results = simple_evaluate(
        model="hf",
        model_args={"pretrained": model},
        tasks=[task],
        batch_size=int(batch_size),
        device="cpu",
        log_samples=False,
        task_manager=manager,
    )
    print(json.dumps(results["results"][task], default=str))


if __name__ == "__main__":
    main()
