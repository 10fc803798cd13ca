"""The command line: `mae-jax JOB --config=PATH[:NAME] --workdir=DIR [--config.GROUP.KEY=VALUE ...]`."""

from __future__ import annotations

import difflib
import logging
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from mae_jax.errors import ConfigError, UserError
from mae_jax.jobs import JOBS

USAGE = "usage: mae-jax JOB --config=PATH[:NAME] --workdir=DIR [--config.GROUP.KEY=VALUE ...]"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one job. Returns the exit code: 0 done, 2 bad configuration or usage, others as in `errors`."""
    # TensorFlow reads images here and should not talk about the rest
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax and TFDS warn of what is no concern of the user's
    try:
        return _run(list(sys.argv[1:] if argv is None else argv))
    except KeyboardInterrupt:  # outside of training, where there is nothing to save
        print("mae-jax: interrupted", file=sys.stderr)
        return 130
    except UserError as error:
        for problem in error.problems:
            print("mae-jax:", " ".join(problem.split()), file=sys.stderr)  # one line each, whatever was quoted
        return error.exit_code


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        width = max(map(len, JOBS))
        print(USAGE, "", "jobs:", *(f"  {name:{width}}  {what}" for name, what in JOBS.items()), sep="\n")
        print("\nmae-jax JOB --help says what a job reads and writes.")
        return 0
    name, *arguments = argv
    if name not in JOBS:
        near = difflib.get_close_matches(name, JOBS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"no job {name!r}; the jobs are {', '.join(JOBS)}{hint}")
    job = import_module(f"mae_jax.jobs.{name}")
    if "-h" in arguments or "--help" in arguments:
        print(USAGE.replace("JOB", name), "", job.__doc__.strip(), sep="\n")
        return 0

    from mae_jax import config

    flags = {"--config": None, "--workdir": None}
    overrides = []
    for argument in arguments:
        flag, separator, value = argument.partition("=")
        if flag in flags and separator and value:
            flags[flag] = value
        elif flag in flags:
            raise ConfigError(f"{flag} has no value; write {flag}=...")
        else:
            overrides.append(argument)
    for flag in ["--config"] + ["--workdir"] * job.WRITES_WORKDIR:
        if not flags[flag]:
            raise ConfigError(f"{flag} is missing; {USAGE.replace('JOB', name)}")
    workdir = Path(os.path.expanduser(flags["--workdir"] or "."))
    if str(workdir).startswith("~"):
        raise ConfigError(f"--workdir={workdir}: no such user")
    job.run(config.load(flags["--config"], overrides), workdir)
    return 0


if __name__ == "__main__":
    sys.exit(main())
