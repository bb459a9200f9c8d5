"""What a config may say: its fields, their types and ranges, phases and rules over parameters."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from configs import common
from efficient import model as model_lib
from efficient.errors import UserError, nearest

# The least value of a config's whole numbers, where it is not 0.
AT_LEAST = {"batch_size": 1, "accumulate": 1, "log_every": 1, "keep_checkpoints": 1}
DECLARE = "declare it with param(shape, init), or buffer(shape, init) where it is not trained"


@dataclasses.dataclass(frozen=True)
class Treatment:
    """What a phase does with one parameter."""

    train: bool = True
    learning_rate: float = 1.0  # multiplies the optimizer's
    weight_decay: float = 1.0  # 0 exempts from decay


def treatment(entry: Mapping[str, Any], where: str) -> Treatment:
    """A rule of `parameters`, without the pattern, which is checked here too."""
    if not isinstance(entry, Mapping) or not isinstance(entry.get("at"), str):
        raise UserError(f"{where}: a rule needs 'at', a pattern over parameter paths")
    _check_pattern(entry["at"], where)
    arguments = {k: v for k, v in entry.items() if k != "at"}
    fields = {f.name for f in dataclasses.fields(Treatment)}
    for name in arguments:
        if name not in fields:
            raise UserError(f"{where}: no field {name!r}; {nearest(name, fields)}")
    found = Treatment(**arguments)
    if not isinstance(found.train, bool):
        raise UserError(f"{where}.train must be True or False, got {found.train!r}")
    if not is_number(found.learning_rate, least=0):
        raise UserError(
            f"{where}.learning_rate multiplies the optimizer's: a number of 0 or more, got"
            f" {found.learning_rate!r}"
        )
    if found.weight_decay not in (0, 1):
        raise UserError(
            f"{where}.weight_decay is 0 (no decay) or 1 (the optimizer's), got"
            f" {found.weight_decay!r}; how much is the optimizer's weight_decay"
        )
    return found


def _check_pattern(pattern: str, where: str) -> None:
    """Refuses what is no regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise UserError(f"{where}: '{pattern}' is no regular expression: {error}") from None


def is_number(value: Any, least: float) -> bool:
    """Whether a value of a config is a number of at least `least`; True and False are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= least


def complete_phase(entry: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A phase with its defaults where it is silent; refuses what is no phase."""
    known = common.phase(1)
    if not isinstance(entry, Mapping):
        raise UserError(f"{where} must come from configs.common.phase, got {entry!r}")
    for name in entry:
        if name not in known:
            raise UserError(f"{where} has no field {name!r}; {nearest(name, known)}")
    steps = entry.get("steps")
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 0:
        raise UserError(f"{where}.steps must be a number of steps, got {steps!r}")
    entry = {**known, **entry}
    for name in ("surgery", "parameters"):
        if not isinstance(entry[name], list | tuple):
            raise UserError(f"{where}.{name} must be a list, got {entry[name]!r}")
    for name, most in (("clip", math.inf), ("ema", 1.0)):
        value = entry[name]
        if value is not None and not (is_number(value, least=0) and 0 < value < most):
            wanted = "a norm above 0" if name == "clip" else "a decay between 0 and 1"
            raise UserError(f"{where}.{name} must be {wanted} or None, got {value!r}")
    if not isinstance(entry["optimizer"], Mapping):
        raise UserError(f"{where}.optimizer must be {{'name': ..., 'learning_rate': ...}}")
    return entry


def check_config(config: ConfigDict) -> None:
    """Refuses fields that no run reads, missing ones, and values of another type or range."""
    known = common.defaults()
    for name in config:
        if name not in known:
            raise UserError(f"config has no field {name!r}; {nearest(name, known.keys())}")
    for name, default in known.items():
        if name not in config:
            raise UserError(f"config.{name} is missing; start from configs.common.defaults()")
        _check_type(config[name], default, f"config.{name}", AT_LEAST.get(name, 0))
    for name, default in known.sample.items():
        if name not in config.sample:
            raise UserError(f"config.sample.{name} is missing; the default is {default!r}")
        _check_type(config.sample[name], default, f"config.sample.{name}", 0)
    for name in config.sample:
        if name not in known.sample:
            hint = nearest(name, known.sample.keys())
            raise UserError(f"config.sample has no field {name!r}; {hint}")
    for name, size in config.mesh.items():
        _check_type(size, 1, f"config.mesh.{name}", -1)
    for name in ("model", "data"):
        if not isinstance(config[name].get("name"), str):
            raise UserError(f"config.{name}: which? add name=...")
    if "split" in config.data:
        raise UserError("config.data.split is not for a config: a run reads both splits")
    steps = [n for n in config.profile if is_number(n, least=0) and isinstance(n, int)]
    if config.profile and (len(steps) != 2 or steps != sorted(config.profile)):
        raise UserError(f"config.profile must be [first, last] steps, got {list(config.profile)}")


def _check_type(value: Any, default: Any, where: str, least: float) -> None:
    kinds = (ConfigDict, list | tuple, bool, str, int, float)
    kind = next(k for k in kinds if isinstance(default, k))
    if kind in (int, float):
        number = int if kind is int else int | float
        if not isinstance(value, number) or not is_number(value, least):
            what = "a whole number" if kind is int else "a number"
            raise UserError(f"{where} must be {what} of {least} or more, got {value!r}")
    elif not isinstance(value, kind):
        raise UserError(f"{where} must be like {default!r}, got {value!r}")


def check_declared(model: nnx.Module) -> None:
    """Refuses arrays and modules that a module holds where nothing would draw or save them."""
    for path, module in model_lib.modules(model):
        for name, value in vars(module).items():
            where = f"{path}/{name}" if path else name
            if isinstance(value, nnx.Variable):
                if value.get_metadata("init_fn", None) is None:
                    raise UserError(f"{where} is an array without an initializer; {DECLARE}")
            elif not isinstance(value, nnx.Module) or isinstance(value, nnx.List):
                _check_held(value, where)


def _check_held(value: Any, where: str) -> None:
    """Refuses arrays in an attribute or its containers, and modules but in a list."""
    if isinstance(value, jax.Array | np.ndarray):
        raise UserError(f"{where} is a bare array; {DECLARE}")
    if isinstance(value, nnx.Variable):
        raise UserError(f"{where} is in a list or dict; give each array an attribute of its own")
    if isinstance(value, nnx.Module) and not isinstance(value, nnx.List):
        raise UserError(f"{where} is in a dict or a nested list; put modules into one nnx.List")
    if isinstance(value, nnx.List | list | tuple):
        for i, item in enumerate(value):
            if not isinstance(item, nnx.Module) or isinstance(item, nnx.List):
                _check_held(item, f"{where}/{i}")
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _check_held(item, f"{where}/{key}")
