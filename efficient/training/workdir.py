"""The folder of a run: the config that it belongs to, and what it keeps of compilation."""

import json
import pathlib
from typing import Any

import jax
from ml_collections import ConfigDict

from efficient.checkpoints.checkpoint import read_metadata
from efficient.errors import UserError
from efficient.training.metrics import FILE_NAME

# What may change between the starts of one run, since its result does not depend on it.
FREE_FIELDS = (
    "data_workers",
    "mesh",
    "pipeline",
    "placement",
    "scopes",
    "sequence",
    "log_every",
    "eval_every",
    "eval_batches",
    "checkpoint_every",
    "keep_checkpoints",
    "profile",
    "sample",
    "plot",
)


def claim(folder: pathlib.Path, config: ConfigDict) -> None:
    """Writes the config into a new workdir; refuses one that another config was run in."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; --workdir names the folder of a run")
    path = folder / "config.json"
    ours, theirs = json.loads(config.to_json_best_effort()), _claimed(folder)
    changed = [k for k in ours if theirs and k not in FREE_FIELDS and theirs.get(k) != ours[k]]
    if changed:
        raise UserError(
            f"{folder} holds a run with another config.{changed[0]}"
            f" ({_short(theirs.get(changed[0]))}, now {_short(ours[changed[0]])});"
            " use a new --workdir"
        )
    if jax.process_index() == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(".new")
            temporary.write_text(json.dumps(ours, indent=1))
            temporary.replace(path)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}; name another folder") from None


def _claimed(folder: pathlib.Path) -> dict[str, Any]:
    """The config of the run in a workdir; of its newest checkpoint where the file is damaged.

    Empty where none has begun to train there.
    """
    if not any((folder / name).exists() for name in (FILE_NAME, "checkpoints")):
        return {}
    try:
        return dict(json.loads((folder / "config.json").read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        pass
    try:
        return read_metadata(str(folder / "checkpoints"))["config"]
    except UserError:  # none that can be read: to restore one will say so
        return {}


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def use_compile_cache(folder: pathlib.Path) -> None:
    """A restarted run compiles nothing that this workdir has compiled before."""
    jax.config.update("jax_compilation_cache_dir", str(folder / "compile_cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
