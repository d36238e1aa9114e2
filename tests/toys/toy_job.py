"""Stands in for ``main.py``: the real ``sweep``, and runs that import nothing and do what they say.

A run's config is JSON: ``run_dir``, ``seconds`` that its first life takes, ``code`` that it ends
with. Later lives take no time, nor do ranks but the first that fail.
"""

import json
import os
import sys
import time
from pathlib import Path


def fit(arguments: list[str]) -> int:
    settings = json.loads(Path(arguments[arguments.index("--config") + 1]).read_text())
    rank = os.environ.get("SLURM_PROCID")
    lives = Path(settings["run_dir"]) / f"lives-{rank}"
    is_first = not lives.exists() and (settings["code"] == 0 or rank in (None, "0"))
    with lives.open("a") as file:
        file.write(json.dumps(arguments) + "\n")
    if is_first:
        time.sleep(settings["seconds"])
    if settings["code"]:
        sys.stderr.write(f"error: told to end with {settings['code']}\n")
    return settings["code"]


def main(arguments: list[str]) -> int:
    if arguments[0] == "fit":
        return fit(arguments)
    from segalign.commands import sweep
    from segalign.error_boundary import run_guarded

    program = (sys.executable, __file__)
    return run_guarded(lambda: sweep.run(arguments[1:], lambda _: None, program))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
