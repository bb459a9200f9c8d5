"""Reads the arrays of a checkpoint and tells damage from other trouble, alike on all processes."""

import logging
import re
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from jaxtyping import Array

from efficient.checkpoints import layout, manifest
from efficient.errors import UserError

Arrays = dict[str, Array]
# What speaks of the machine and not of the checkpoint, so that it must not count as damage.
NOT_DAMAGE = (UserError, MemoryError, PermissionError, jax.errors.JaxRuntimeError)
NOT_DAMAGE_STATUS = re.compile("PERMISSION_DENIED|RESOURCE_EXHAUSTED|UNAVAILABLE|DEADLINE_EXCEEDED")


def read_arrays(
    path: epath.Path, wanted: Mapping[str, jax.ShapeDtypeStruct], document: Mapping[str, Any]
) -> tuple[Arrays | None, str]:
    """The arrays, or None and what is wrong with them."""
    if not wanted:
        return {}, ""
    single, why = agree(_read_single, path, layout.layer_structs(wanted))
    if single is None:
        return None, why
    arrays = layout.stack(single, wanted, {k: v.sharding for k, v in wanted.items()}, donate=True)
    found = layout.Checksums(arrays).result()
    wrong = [p for p in found if found[p] != document["arrays"][p]["checksum"]]
    if wrong:
        return None, f"the checksum of {manifest.names(wrong)} is wrong"
    return arrays, ""


def _read_single(path: epath.Path, structs: Mapping[str, jax.ShapeDtypeStruct]) -> Arrays:
    restore_args = {
        name: ocp.ArrayRestoreArgs(sharding=s.sharding, global_shape=s.shape)
        for name, s in structs.items()
    }
    # The handler and not a Checkpointer, whose barrier would hang where one process fails.
    handler = ocp.PyTreeCheckpointHandler()
    item = dict.fromkeys(structs, 0)
    args = ocp.args.PyTreeRestore(item=item, restore_args=restore_args, partial_restore=True)
    arrays = handler.restore(path / "arrays", args=args)
    for name, struct in structs.items():
        if (arrays[name].shape, arrays[name].dtype) != (struct.shape, struct.dtype):
            raise ValueError(f"{name} is not of the shape and dtype that its metadata says")
    return jax.block_until_ready(arrays)


def quiet_orbax() -> None:
    """Silences Orbax below ERROR, and what is left over when one of its many reads has failed.

    Orbax reads all arrays at once and raises the first error. Python prints the others with
    tracebacks whenever it happens to free them, though one line has told of the damage already.
    Only records and coroutines of Orbax and TensorStore are dropped.
    """
    for name, keep in (("absl", _not_chatter), ("asyncio", _not_left_over)):
        logger = logging.getLogger(name)
        if keep not in logger.filters:
            logger.addFilter(keep)
    unawaited = "coroutine '.*_get_array_metadatas' was never awaited"
    warnings.filterwarnings("ignore", unawaited, RuntimeWarning)
    before = sys.unraisablehook
    if getattr(before, "drops_orbax", False):
        return

    def hook(unraisable) -> None:
        code = getattr(unraisable.object, "cr_code", None)  # of a coroutine
        of_orbax = code is not None and "orbax" in code.co_filename
        of_its_loop = unraisable.object is None and "loop is closed" in str(unraisable.exc_value)
        if not of_orbax and not of_its_loop:
            before(unraisable)

    hook.drops_orbax = True
    sys.unraisablehook = hook


def _not_chatter(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR or "orbax" not in record.pathname


def _not_left_over(record: logging.LogRecord) -> bool:
    text = record.getMessage().lower()
    return "was never retrieved" not in text or not ("orbax" in text or "tensorstore" in text)


def agree(attempt: Callable[..., Any], *args) -> tuple[Any, str]:
    """`(attempt(*args), "")`, or `(None, why)` on all processes where it fails on one."""
    try:
        result, why = attempt(*args), ""
    except Exception as error:
        if isinstance(error, NOT_DAMAGE) or NOT_DAMAGE_STATUS.search(str(error)):
            raise
        result, why = None, why_of(error)
    if jax.process_count() > 1:
        fine = multihost_utils.process_allgather(np.asarray(result is not None))
        if not fine.all():
            return None, why or "another process could not read it"
    return result, why


def from_first_process(step: int) -> int:
    """The step that process 0 has chosen; a shared file system may list late elsewhere."""
    if jax.process_count() == 1:
        return step
    return int(multihost_utils.broadcast_one_to_all(np.int32(step)))


def why_of(error: BaseException) -> str:
    """An error as the middle of a sentence, without the paths and specs that TensorStore adds."""
    while error.__cause__ is not None:  # Orbax wraps; the first error says what it was
        error = error.__cause__
    text = (str(error).strip().splitlines() or [""])[0].split(" [tensorstore_spec=")[0]
    text = re.sub(r"( at| of)? local file \"[^\"]*\"", "", text)
    text = text if len(text) <= 240 else text[:237] + "..."
    return text if type(error) is ValueError and text else f"{type(error).__name__}: {text}"
