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
import re
import runpy
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import flax.linen as nn
from absl import flags
from ml_collections import ConfigDict, config_flags

from mae_jax.errors import ConfigError

PACKAGE = Path(__file__).resolve().parent
GIVEN_TO_MODULES = {"parent", "name", "dtype", "target_width"}  # attributes of linen modules that jobs fill in


def nearest(word: str, words: Iterable[str]) -> str:
    """"; did you mean X?" for the closest of `words`, or nothing."""
    near = difflib.get_close_matches(word, list(words), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def load(spec: str, arguments: Sequence[str] = ()) -> ConfigDict:
    """The config that `spec` = PATH[:NAME] names, changed by `arguments` such as "--config.mask.ratio=0.5".

    A PATH that is not there but begins with configs/ is looked for among the recipes that come with the package.

    Raises:
      ConfigError: no such file, recipe or key, or a value of the wrong type.
    """
    path, _, name = spec.partition(":")
    try:
        make = runpy.run_path(str(_find(path)))["get_config"]
        config = make(name) if name else make()
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"--config={spec}: {_one_line(error)}") from error
    known = flatten(config)
    for argument in arguments:
        key = re.fullmatch(r"--config\.([\w.]+)(=.*)?", argument, re.DOTALL)
        if not key:
            raise ConfigError(f"{argument}: not understood; settings are given as --config.GROUP.KEY=VALUE")
        if key[1] not in known:
            raise ConfigError(f"{argument}: no such key in {spec}{nearest(key[1], known)}")
        if key[2] is None:
            raise ConfigError(f"{argument}: has no value; write --config.{key[1]}=VALUE")
    values = flags.FlagValues()
    argv = ["mae-jax", *arguments]
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
        values(argv)
    except Exception as error:
        raise ConfigError(_one_line(error).removeprefix("flag ")) from error
    return config


def _find(path: str) -> Path:
    """The file at `path`, or the recipe of that name that comes with the package, in a checkout or installed."""
    shipped = [PACKAGE / path, PACKAGE.parent / path] if path.startswith("configs/") else []
    for candidate in (Path(path), *shipped):
        if candidate.is_file():
            return candidate
    recipes = [f"configs/{p.name}" for root in {s.parent for s in shipped} for p in root.glob("*.py")]
    raise ConfigError(f"--config: no file {path!r}{nearest(path, recipes)}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def flatten(config: Mapping, prefix: str = "") -> dict:
    """The leaves of a config by dotted path: {"mask.ratio": 0.75, ...}."""
    leaves = {}
    for key, value in config.items():
        leaves |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping | ConfigDict) else {prefix + key: value}
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


def _name(kind) -> str:
    return kind.__name__ if inspect.isclass(kind) else str(kind).replace("collections.abc.", "")


def _label(function: Callable) -> str:
    return f"{function.__module__.removeprefix('mae_jax.')}.{function.__qualname__}"
