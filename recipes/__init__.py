"""The stages of a run, one module each with `run(cfg, inputs, out)`; `__main__.py` runs them."""

import sys

# Modules with a command line of their own, without --config.
COMMANDS = ("benchmark", "prepare_data", "recovery", "report", "served")

# Python imports this package to find the module that `python -m` names; until then sys.argv[0] is "-m". Without this
# check, `python -m recipes.distill` would import the stage and end with exit status 0.
if sys.argv[:1] == ["-m"] and "-m" in sys.orig_argv:
    _package, _, _name = sys.orig_argv[sys.orig_argv.index("-m") + 1].partition(".")
    _is_command = _name in COMMANDS and not any(argument.startswith("--config") for argument in sys.argv[1:])
    if _package == __name__ and _name not in ("", "__main__") and not _is_command:
        print(
            f"error: python -m {_package}.{_name} starts no stage; use python -m {_package} {_name} --config"
            " RUN_DIR/resolved.yaml",
            file=sys.stderr,
        )
        sys.exit(2)
