"""From a command line to a config, and from a config to the functions it configures.

A config is an ml_collections file: `get_config(name)` returns a ConfigDict of groups. Each group is splatted into
exactly one function, so the function's signature is the group's schema: a typo is found by comparing the two, and
what a config leaves out is the signature's default.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import inspect
import json
import math
import os
import re
import runpy
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import flax.linen as nn
from absl import flags
from ml_collections import ConfigDict, config_flags
from ml_collections.config_dict import RequiredValueError

from mae_jax.errors import ConfigError, nearest

PACKAGE = Path(__file__).resolve().parent
# attributes of linen modules that jobs fill in
GIVEN_TO_MODULES = {"parent", "name", "dtype", "target_width", "encoder", "classes"}
UNSET = object()  # what stands for a required placeholder


def load(spec: str, overrides: Sequence[str] = ()) -> tuple[ConfigDict, list[str]]:
    """The config that `spec` = PATH[:NAME] names, changed by `overrides` such as "--config.mask.ratio=0.5".

    A PATH that is not there but begins with configs/ is looked for among the recipes that come with the package.

    Returns:
      The config, and a line for each override that was left out: no such key, or a value of the wrong type.

    Raises:
      ConfigError: no such file or recipe, or one that makes no config.
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
    ]
    if problems:
        raise ConfigError(problems)
    return config, [problem for override in overrides if (problem := _override(config, override, spec))]


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
    recipes = [str(Path(path).parent / p.name) for root in {s.parent for s in shipped} for p in root.glob("*.py")]
    raise ConfigError(f"--config: no file {path!r}{nearest(path, recipes)}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


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


def complete(
    config: ConfigDict, schema: Mapping[str, Callable], values: Mapping[str, typing.Any]
) -> tuple[ConfigDict | None, list[str]]:
    """Hold a config against its schema.

    Args:
      schema: for each group, the function it is splatted into; its keyword-only parameters are the group's keys. (Of
        a linen module: its attributes.)
      values: the keys outside any group, with their type hints.

    Returns:
      The config with every setting in it, and what is wrong with the given one, a line each. A setting that is not
      given, or is of the wrong type, is the signature's default; if there is no default, there is no config either.
    """
    problems = [
        f"config.{key}: no such group or key{nearest(key, [*schema, *values])}"
        for key in config
        if key not in schema and key not in values
    ]
    whole = {}
    for key, kind in values.items():
        if key not in config:
            problems.append(f"config.{key}: missing")
        elif not _is(config[key], kind):
            problems.append(f"config.{key}: {config[key]!r} is not of type {_name(kind)}")
        elif wrong := _out_of_bounds(config[key]):
            problems.append(f"config.{key}: {wrong}")
        else:
            whole[key] = config[key]
    for group, function in schema.items():
        if isinstance(config.get(group), ConfigDict):
            settings, wrong = _complete_group(group, config[group], function)
            problems += wrong
            whole |= {} if settings is None else {group: settings}
        else:
            problems.append(f"config.{group}: missing, or not a group; it holds the settings of {_label(function)}")
    return ConfigDict(whole) if len(whole) == len(schema) + len(values) else None, problems


def _complete_group(group: str, given: ConfigDict, function: Callable) -> tuple[dict | None, list[str]]:
    module = issubclass(function, nn.Module) if inspect.isclass(function) else False
    parameters = {
        key: parameter.default
        for key, parameter in inspect.signature(function).parameters.items()
        if (key not in GIVEN_TO_MODULES if module else parameter.kind is parameter.KEYWORD_ONLY)
    }
    typed = function.__init__ if inspect.isclass(function) and not dataclasses.is_dataclass(function) else function
    hints = typing.get_type_hints(typed)
    settings, problems = parameters | dict(given), []
    for key in given:
        where = f"config.{group}.{key}"
        if key not in parameters:
            problems.append(f"{where}: {_label(function)} has no such setting{nearest(key, parameters)}")
            del settings[key]
        elif not _is(given[key], hints.get(key, typing.Any)):
            problems.append(f"{where}: {given[key]!r} is not of type {_name(hints[key])}")
            settings[key] = parameters[key]
        elif wrong := _out_of_bounds(given[key]):
            problems.append(f"{where}: {wrong}")
            settings[key] = parameters[key]
    problems += [
        f"config.{group}.{key}: missing; {_label(function)} needs it"
        for key, default in parameters.items()
        if default is inspect.Parameter.empty and key not in given
    ]
    return None if inspect.Parameter.empty in settings.values() else settings, problems


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


def _out_of_bounds(value) -> str:
    """What is wrong with a number, or with one of a sequence: it is NaN, infinite or too long for 64 bits."""
    if isinstance(value, (tuple, list)):
        return next(filter(None, map(_out_of_bounds, value)), "")
    if isinstance(value, float) and not math.isfinite(value):
        return f"{value!r} is not finite"
    if isinstance(value, int) and abs(value) >= 2**63:  # of any length, so that it is not written out
        return f"a number of {value.bit_length()} bits is too large"
    return ""


def _name(kind) -> str:
    return kind.__name__ if inspect.isclass(kind) else str(kind).replace("collections.abc.", "")


def _label(function: Callable) -> str:
    return f"{function.__module__.removeprefix('mae_jax.')}.{function.__qualname__}"
