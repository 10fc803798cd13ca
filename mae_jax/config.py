"""From a command line to a config, and from a config to the functions it configures.

A config is an ml_collections file: `get_config(name)` returns a ConfigDict of groups. Each group is splatted into
exactly one function, so the function's signature is the group's schema, and a typo is found by comparing the two.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import difflib
import inspect
import json
import math
import os
import re
import runpy
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import flax.linen as nn
from absl import flags
from ml_collections import ConfigDict, config_flags
from ml_collections.config_dict import RequiredValueError

from mae_jax.errors import ConfigError

PACKAGE = Path(__file__).resolve().parent
GIVEN_TO_MODULES = {"parent", "name", "dtype", "target_width"}  # attributes of linen modules that jobs fill in
UNSET = object()  # what stands for a required placeholder


def nearest(word: str, words: Iterable[str]) -> str:
    """ "; did you mean X?" for the closest of `words`, or nothing."""
    near = difflib.get_close_matches(word, list(words), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def load(spec: str, arguments: Sequence[str] = ()) -> ConfigDict:
    """The config that `spec` = PATH[:NAME] names, changed by `arguments` such as "--config.mask.ratio=0.5".

    A PATH that is not there but begins with configs/ is looked for among the recipes that come with the package.

    Raises:
      ConfigError: no such file or recipe; or no such keys, or values of the wrong type: then all of them are listed.
    """
    path, _, name = spec.partition(":")
    try:
        make = runpy.run_path(str(_find(path))).get("get_config")
        if make is None:
            raise ConfigError(f"--config={spec}: the file defines no function get_config")
        config = make(name) if name else make()
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:
        raise ConfigError(f"--config={spec}: {type(error).__name__}: {_one_line(error)}") from error
    if type(config) is not ConfigDict:
        raise ConfigError(f"--config={spec}: get_config returns {type(config).__name__}, not ml_collections.ConfigDict")
    problems = [
        f"config.{key}: a required placeholder, which overrides cannot fill; make it a value or placeholder() in {path}"
        for key, value in flatten(config).items()
        if value is UNSET
    ] or [problem for argument in arguments if (problem := _override(config, argument, spec))]
    if problems:
        raise ConfigError(problems)
    return config


def _override(config: ConfigDict, argument: str, spec: str) -> str | None:
    """Change `config` as `argument` = "--config.GROUP.KEY=VALUE" says, or tell what is wrong with that."""
    key = re.fullmatch(r"--config\.([\w.]+)(=.*)?", argument, re.DOTALL)
    known = flatten(config)
    if not key:
        return f"{argument}: not understood; settings are given as --config.GROUP.KEY=VALUE"
    if any(other.startswith(key[1] + ".") for other in known):
        return f"{argument}: config.{key[1]} is a group; set one of its keys: --config.{key[1]}.KEY=VALUE"
    if key[1] not in known:
        return f"{argument}: no such key in {spec}{nearest(key[1], known)}"
    if key[2] is None:
        return f"{argument}: has no value; write --config.{key[1]}=VALUE"
    values = flags.FlagValues()
    argv = ["mae-jax", argument]
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
        values(argv)
    except Exception as error:
        return _one_line(error).removeprefix("flag ")
    return None


def _find(path: str) -> Path:
    """The file at `path`, or the recipe of that name that comes with the package, in a checkout or installed."""
    shipped = [PACKAGE / path, PACKAGE.parent / path] if path.startswith("configs/") else []
    for candidate in (Path(os.path.expanduser(path)), *shipped):
        if candidate.is_file():
            return candidate
    recipes = [f"configs/{p.name}" for root in {s.parent for s in shipped} for p in root.glob("*.py")]
    raise ConfigError(f"--config: no file {path!r}{nearest(path, recipes)}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def write_json(path: Path, value) -> None:
    """Write a JSON file whole or not at all, so that a crash leaves no half of one."""
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(value, indent=2) + "\n")
    unfinished.replace(path)


def make_workdir(workdir: Path) -> None:
    """Make the folder `workdir` unless it is there.

    Raises:
      ConfigError: it cannot be made or written to.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        writable = os.access(workdir, os.W_OK | os.X_OK)
        reason = "it is not writable"
    except OSError as error:
        writable, reason = False, error.strerror
    if not writable:
        raise ConfigError(f"--workdir={workdir}: {reason}; name a folder that can be made and written to")


def flatten(config: Mapping, prefix: str = "") -> dict:
    """The leaves of a config by dotted path: {"mask.ratio": 0.75, ...}; `UNSET` for a required placeholder."""
    leaves = {}
    for key in config:
        try:
            value = config[key]
        except RequiredValueError:
            value = UNSET
        leaves |= (
            flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping | ConfigDict) else {prefix + key: value}
        )
    return leaves


def to_json(config: ConfigDict) -> dict:
    """The config as plain JSON values: tuples become lists."""
    return json.loads(config.to_json())


def schema_problems(config: ConfigDict, schema: Mapping[str, Callable], values: Mapping[str, type]) -> list[str]:
    """What is wrong with the keys and types of a config, one line each.

    Args:
      schema: for each group, the function it is splatted into; its keyword-only parameters are the group's keys. (Of
        a linen module: its attributes.)
      values: the keys outside any group, with their types.
    """
    problems = []
    for key in config:
        if key not in schema and key not in values:
            problems.append(f"config.{key}: no such group or key{nearest(key, [*schema, *values])}")
    for key, kind in values.items():
        if key not in config:
            problems.append(f"config.{key}: missing")
        elif not _is(config[key], kind):
            problems.append(f"config.{key}: {config[key]!r} is not of type {_name(kind)}")
    for group, function in schema.items():
        if not isinstance(config.get(group), ConfigDict):
            problems.append(f"config.{group}: missing, or not a group; it holds the settings of {_label(function)}")
        else:
            problems += _group_problems(group, config[group], function)
    return problems


def _group_problems(group: str, settings: ConfigDict, function: Callable) -> list[str]:
    module = issubclass(function, nn.Module) if inspect.isclass(function) else False
    parameters = {
        key: parameter
        for key, parameter in inspect.signature(function).parameters.items()
        if (key not in GIVEN_TO_MODULES if module else parameter.kind is parameter.KEYWORD_ONLY)
    }
    typed = function.__init__ if inspect.isclass(function) and not dataclasses.is_dataclass(function) else function
    hints = typing.get_type_hints(typed)
    problems = []
    for key in settings:
        where = f"config.{group}.{key}"
        if key not in parameters:
            problems.append(f"{where}: {_label(function)} has no such setting{nearest(key, parameters)}")
        elif not _is(settings[key], hints.get(key, typing.Any)):
            problems.append(f"{where}: {settings[key]!r} is not of type {_name(hints[key])}")
        elif not _finite(settings[key]):
            problems.append(f"{where}: {settings[key]!r} is not finite")
    for key, parameter in parameters.items():
        if parameter.default is parameter.empty and key not in settings:
            problems.append(f"config.{group}.{key}: missing; {_label(function)} needs it")
    return problems


def _is(value, kind) -> bool:
    """Whether a config's value fits a type hint, of those that the signatures of this project use."""
    if kind is typing.Any:
        return True
    if typing.get_origin(kind) is collections.abc.Sequence:
        return isinstance(value, (tuple, list)) and all(_is(v, typing.get_args(kind)[0]) for v in value)
    if typing.get_args(kind):  # a union
        return any(_is(value, k) for k in typing.get_args(kind))
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def _finite(value) -> bool:
    """Whether a number is neither NaN nor infinite; all of them, of a sequence."""
    if isinstance(value, (tuple, list)):
        return all(map(_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def _name(kind) -> str:
    return kind.__name__ if inspect.isclass(kind) else str(kind).replace("collections.abc.", "")


def _label(function: Callable) -> str:
    return f"{function.__module__.removeprefix('mae_jax.')}.{function.__qualname__}"
