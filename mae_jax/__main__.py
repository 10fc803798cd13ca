"""The command line: `mae-jax JOB --config=PATH[:NAME] --workdir=DIR [--config.GROUP.KEY=VALUE ...]`.

Jobs that have no config, such as sweep, import and export, have flags of their own. The others run on several hosts as
well, with the same command on each; --coordinator=HOST:PORT --processes=N --process=I tell what Slurm and TPU VMs tell
by themselves.
"""

from __future__ import annotations

import keyword
import logging
import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

from mae_jax import compiled
from mae_jax.errors import ConfigError, Interrupted, UserError, nearest, report
from mae_jax.files import path_of
from mae_jax.jobs import JOBS

USAGE = "usage: mae-jax JOB --config=PATH[:NAME] --workdir=DIR [--config.GROUP.KEY=VALUE ...]"

# flags that are read by training/hosts.py
OF_SEVERAL_HOSTS = ("coordinator", "processes", "process", "heartbeat", "hang")
SEVERAL = ("--coordinator=HOST:PORT", "--processes=N", "--process=I")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one job. Returns the exit code: 0 done, 2 bad configuration or usage, others as in `errors`."""
    # TensorFlow reads images here and should not talk about the rest
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    # Orbax, clu and TFDS warn of what is no concern of the user's, and print the tracebacks of what they raise as well
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        return _run(list(sys.argv[1:] if argv is None else argv))
    except KeyboardInterrupt:  # outside of training, where there is nothing to save
        print("mae-jax: interrupted", file=sys.stderr)
        return 130
    except UserError as error:
        return report(error)


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        width = max(map(len, JOBS))
        print(USAGE, "", "jobs:", *(f"  {name:{width}}  {what}" for name, what in JOBS.items()), sep="\n")
        print("\nmae-jax JOB --help says what a job reads and writes.")
        print("On several hosts: the same command on each, under Slurm, on a TPU VM, or with", " ".join(SEVERAL))
        return 0
    name, *arguments = argv
    if name not in JOBS:
        raise ConfigError(f"no job {name!r}; the jobs are {', '.join(JOBS)}{nearest(name, JOBS)}")
    job = import_module(f"mae_jax.jobs.{name.replace('-', '_')}" + "_" * keyword.iskeyword(name))
    usage = USAGE.replace("JOB", name)
    also = getattr(job, "ALSO", ())  # flags beside the config
    if also:
        usage = usage.replace("--workdir=DIR", " ".join(f"--{flag}=..." for flag in also))
    own = getattr(job, "FLAGS", None)
    if own:
        usage = f"usage: mae-jax {name} " + " ".join(f"--{flag}=..." for flag in job.REQUIRED)
    if "-h" in arguments or "--help" in arguments:
        print(usage, "", job.__doc__.strip(), sep="\n")
        return 0
    required = job.REQUIRED if own else ["config"] + ["workdir"] * job.WRITES_WORKDIR
    known = own or ("config", "workdir", *also, *OF_SEVERAL_HOSTS * job.WRITES_WORKDIR)
    switches = [f"--{switch}" for switch in getattr(job, "SWITCHES", ())]
    given = {argument.removeprefix("--"): "yes" for argument in arguments if argument in switches}
    arguments = [argument for argument in arguments if argument not in switches]
    flags, rest = _flags(arguments, known, required, usage)
    if own:
        if rest:
            raise ConfigError(
                [
                    f"{flag}: no such flag{nearest(flag.partition('=')[0], [*(f'--{f}' for f in own), *switches])}"
                    for flag in rest
                ]
            )
        from mae_jax.model import native

        native.return_freed_memory()
        before = signal.signal(signal.SIGTERM, _stop)
        try:
            job.run(flags | given)
        finally:
            signal.signal(signal.SIGTERM, before)
        return 0

    from mae_jax import config

    workdir = path_of("workdir", flags.get("workdir", "."))
    beside = {flag: flags[flag] for flag in also if flag in flags}
    settings, problems = config.load(flags["config"], rest)
    if problems:
        try:
            job.check(settings, **beside)
        except UserError as error:
            problems += error.problems
        raise ConfigError(problems)
    from mae_jax.model import native  # and with it JAX, which a mistake in the config need not wait for

    _keep_what_is_compiled()
    native.keep_freed_memory()
    from mae_jax.training import hosts

    if not job.WRITES_WORKDIR:
        job.run(settings, workdir, **beside)
        return 0
    with hosts.joined(flags):
        told = {f"config.{key}": value for key, value in config.flatten(settings).items()}
        versions = {f"the version of {name}": version(name) for name in ("mae_jax", "jax")}
        given = {"the job": name, "--workdir": workdir, "--processes": flags.get("processes", "not given")}
        hosts.agree(given | told | versions)
        job.run(settings, workdir)
    return 0


def _stop(signum, frame) -> None:
    """End a job that writes all or nothing, as Ctrl-C does."""
    raise Interrupted(signum, "interrupted; nothing is written")


def _flags(
    arguments: Sequence[str], known: Sequence[str], required: Sequence[str], usage: str
) -> tuple[dict[str, str], list[str]]:
    """The values of the `known` flags that are given, by name without dashes, and all other arguments.

    Raises:
      ConfigError: one has no value, or one that is required is missing.
    """
    flags, rest = {}, []
    for argument in arguments:
        flag, separator, value = argument.partition("=")
        if flag.removeprefix("--") not in known or not flag.startswith("--"):
            rest.append(argument)
        elif separator and value:
            flags[flag.removeprefix("--")] = value
        else:
            raise ConfigError(f"{flag} has no value; write {flag}=...")
    for flag in required:
        if flag not in flags:
            raise ConfigError(f"--{flag} is missing; {usage}")
    return flags, rest


def _keep_what_is_compiled() -> None:
    """A second start of a recipe need not compile again. JAX_COMPILATION_CACHE_DIR names another folder."""
    import jax

    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(compiled.folder("compiled")))
    compiled.replace_damaged(Path(jax.config.jax_compilation_cache_dir))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


if __name__ == "__main__":
    sys.exit(main())
