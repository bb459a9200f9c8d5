"""Checkpoints of a run, written by Orbax while training goes on.

`directory/300/` holds the arrays of step 300 as a flat dict, path -> array, one entry for a layer
(`params/blocks/7/mixer/q/kernel`), and one JSON file. Anyone opens it without this project:

    import json, numpy as np, orbax.checkpoint as ocp
    reader, path = ocp.PyTreeCheckpointer(), "/.../300/arrays"
    names = reader.metadata(path).item_metadata.tree
    arrays = reader.restore(path, restore_args={
        name: ocp.RestoreArgs(restore_type=np.ndarray) for name in names})
    metadata = json.load(open("/.../300/metadata/metadata"))["metadata"]

The JSON also says shape, dtype and checksum of every layer under "arrays", and its own crc32.

Guarantees:

- Atomic: a step is written under a temporary name and renamed when complete. A process killed at
  any moment leaves the checkpoints before it whole. (Files are not fsynced: after a power cut the
  newest may be cut short, which the checksums find.)
- Safe to donate: `save` returns once the state is copied.
- Damage is found when arrays are read: missing and truncated files, garbled JSON, flipped bits.
  Zarr and OCDBT as Orbax writes them guard their indices only, and arrays of up to 1 KiB that lie
  in these, so each layer has a checksum (`layout.Checksums`) that covers the way from device
  memory to disk and back. Arrays that are not read are not checked.
- Nothing damaged is deleted. Reading changes no file. The first save after a damaged checkpoint was
  met renames it to `300.damaged`; later steps that a run has gone back behind are renamed to
  `400.superseded`, so that the newest checkpoint is always the one to resume from.
- Several processes (`jax.distributed`): every process calls the same methods in the same order on
  a directory that all share. Each writes its own shards, checksums are computed globally, and all
  agree on which checkpoint is damaged. One writing run for a directory. Here `save` also waits for
  Orbax's own start of a save, which must keep its order among the collectives of the caller.

Orbax tells of its progress through absl's logger; making a `Checkpointer` silences its records
below ERROR (`reading.quiet_orbax`), and no others.
"""

import atexit
import json
import re
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from jaxtyping import Array

from efficient.checkpoints import layout, manifest, reading
from efficient.errors import UserError

Arrays = dict[str, Array]
Target = Mapping[str, jax.ShapeDtypeStruct]
LEFTOVER = re.compile(r"\d+\.(orbax-checkpoint-tmp.*|deleted)")


class Checkpointer:
    """The checkpoints of one run; close it, or use it in a `with` statement.

    Left open, a save under way when Python exits is finished on Python 3.11. From 3.12 on Python
    starts no threads by then: such a save is lost, and one printed line says so.

    Args:
      directory: where the steps are; made by the first save. `gs://` paths work where Orbax's do.
      keep: how many of the newest checkpoints to keep.
      keep_every: keep every checkpoint whose step is a multiple of this as well.
    """

    def __init__(self, directory: str, *, keep: int = 2, keep_every: int | None = None):
        if keep < 1 or (keep_every is not None and keep_every < 1):
            raise UserError(f"keep={keep}, keep_every={keep_every}: both must be 1 or more")
        reading.quiet_orbax()
        self.directory = epath.Path(directory).absolute()
        self._keep, self._keep_every = keep, keep_every
        self._damaged: dict[int, str] = {}  # met by `restore`; renamed by the next save
        self._orbax: ocp.AsyncCheckpointer | None = None
        self._writer: threading.Thread | None = None
        self._failure: tuple[int, BaseException] | None = None
        _OPEN.add(self)

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def save(
        self, step: int, arrays: Mapping[str, Array], metadata: Mapping[str, Any], *, wait=False
    ) -> None:
        """Copies the state and writes it in the background; `arrays` may be donated afterwards.

        Waits first for a save that is still being written. On an accelerator the copy goes through
        pinned host memory, at most `layout.GROUP_BYTES` of device memory at a time.

        Args:
          step: training steps done, 0 or more.
          arrays: path -> array; a key may hold one range of layers (`blocks/0-11/q`).
          metadata: what JSON can hold; `step` and `versions` are added.
          wait: return when the checkpoint is complete.

        Raises:
          UserError: bad input, or the save before this one could not be written.
        """
        _check_arrays(step, arrays)
        metadata = {**metadata, "step": step, "versions": manifest.versions()}
        try:
            json.dumps(metadata)
        except (TypeError, ValueError) as error:
            raise UserError(f"metadata of step {step} cannot be written as JSON: {error}") from None
        self.wait()
        if self._orbax is None:
            self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
            if jax.process_index() == 0:
                self.directory.mkdir(parents=True, exist_ok=True)
                self._remove_leftovers()
        copies = _copy(arrays)
        if jax.process_count() > 1:  # Orbax starts with collectives, which keep the caller's order
            self._start(step, copies, metadata)
            work = (step,)
        else:
            work = (step, copies, metadata)
        self._writer = threading.Thread(target=self._finish, args=work, name="checkpoint")
        self._writer.start()
        if wait:
            self.wait()

    def wait(self) -> None:
        """Returns when no save is being written; raises UserError where the last one failed."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        if self._failure is not None:
            (step, error), self._failure = self._failure, None
            raise UserError(
                f"checkpoint {step} could not be written: {reading.why_of(error)}"
            ) from error

    def close(self) -> None:
        """Waits for the last save and lets go of Orbax's threads."""
        try:
            self.wait()
        finally:
            if self._orbax is not None:
                self._orbax.close()
                self._orbax = None

    def latest(self) -> int | None:
        """The newest complete step that this object has not found damaged."""
        found = [s for s in self._steps() if s not in self._damaged]
        return found[-1] if found else None

    def restore(
        self,
        target: Target | Callable[[Mapping[str, Any]], Target],
        step: int | None = None,
        *,
        strict: bool = True,
        allow_missing: Iterable[str] = (),
        allow_extra: Iterable[str] = (),
    ):
        """Reads arrays straight to the devices of `target`, whatever mesh they were saved from.

        A damaged newest checkpoint is named in a printed line and the one before it is used.

        Args:
          target: shape, dtype and sharding by key; a key may hold one range of layers. Or a
            function that gives them from the metadata of the checkpoint that is read.
          step: this one and no other; by default the newest.
          strict: whether every layer must match; otherwise what matches is loaded. A stack of which
            one layer does not match is left out whole.
          allow_missing: regular expressions of whole paths that the checkpoint need not hold.
          allow_extra: the same for paths that `target` need not hold (`optimizer/.*`).

        Returns:
          `(arrays, metadata)`; where `strict` is False, `(arrays, metadata, fit)`: the
          `manifest.Fit` names missing, extra and misshapen layers.

        Raises:
          UserError: nothing to restore, every checkpoint damaged, or `target` does not fit.
        """
        self.wait()
        if not callable(target):
            layout.layer_structs(target)  # bad input is told before anything is read
        for candidate, path in self._candidates(step):
            document, why = reading.agree(manifest.read_document, path)
            arrays = None
            if document is not None:
                structs = target(document["metadata"]) if callable(target) else target
                single = layout.layer_structs(structs)
                fit = manifest.Fit.of(
                    single, manifest.listing(document), allow_missing, allow_extra
                )
                if strict and not fit:
                    raise UserError(f"checkpoint {candidate} does not fit: {fit}")
                wanted = {k: structs[k] for k in structs if fit.covers(layout.layers(k))}
                arrays, why = reading.read_arrays(path, wanted, document)
            if arrays is not None:
                self._damaged.pop(candidate, None)  # asked for again and mended since
                metadata = document["metadata"]
                return (arrays, metadata) if strict else (arrays, metadata, fit)
            self._damaged[candidate] = why
        raise AssertionError("_candidates raises where nothing is left")

    def _candidates(self, step: int | None) -> Iterator[tuple[int, epath.Path]]:
        """Steps to try, newest first; says what was wrong with the one before."""
        tried: list[int] = []
        while True:
            steps = self._steps()
            untried = [s for s in steps if s not in self._damaged]
            if step is not None:
                untried = [s for s in steps if s == step and s not in tried]
            chosen = reading.from_first_process(untried[-1] if untried else -1)
            whys = "; ".join(
                f"{s}: {self._damaged[s]}" for s in reversed(steps) if s in self._damaged
            )
            if chosen < 0 and step is not None and not tried:
                raise UserError(
                    f"{self.directory} has no checkpoint {step}; it has {steps or 'none'}"
                )
            if chosen < 0 and not whys:
                raise UserError(f"{self.directory} holds no checkpoint; train, or name another")
            if chosen < 0 and step is not None:
                raise UserError(
                    f"checkpoint {step} is damaged: {self._damaged[step]}; name another"
                )
            if chosen < 0:
                raise UserError(f"every checkpoint in {self.directory} is damaged ({whys})")
            if tried:
                _say(
                    f"checkpoint {tried[-1]} is damaged: {self._damaged[tried[-1]]}; using {chosen}"
                )
            tried.append(chosen)
            yield chosen, self.directory / str(chosen)

    def _steps(self) -> list[int]:
        return _steps_in(self.directory)

    def _start(self, step: int, copies: Callable, metadata: dict[str, Any]) -> None:
        """Hands the copies to Orbax, after making room for the step."""
        single, checksums = copies()
        document = manifest.document(single, checksums, metadata)
        if jax.process_index() == 0:
            self._set_aside(step)
        items = {"arrays": ocp.args.PyTreeSave(single), "metadata": ocp.args.JsonSave(document)}
        self._orbax.save(self.directory / str(step), args=ocp.args.Composite(**items))

    def _finish(self, step: int, *to_start) -> None:
        """Runs in its own thread: the rest of the save, then what `keep` no longer keeps."""
        try:
            if to_start:
                self._start(step, *to_start)
            self._orbax.wait_until_finished()
            if jax.process_index() == 0:
                self._prune()
        except BaseException as error:  # raised again by the next `wait`
            self._failure = (step, error)

    def _set_aside(self, step: int) -> None:
        """Renames what is damaged and what a save of `step` makes obsolete; deletes nothing."""
        for old in self._steps():
            if old in self._damaged or old >= step:
                name = f"{old}.{'damaged' if old in self._damaged else 'superseded'}"
                taken = {p.name for p in self.directory.iterdir()}
                count = next(i for i in range(len(taken) + 1) if _numbered(name, i) not in taken)
                (self.directory / str(old)).rename(self.directory / _numbered(name, count))
                _say(f"checkpoint {old} is now {_numbered(name, count)}")
        self._damaged.clear()

    def _prune(self) -> None:
        for step in self._steps()[: -self._keep]:
            if not self._keep_every or step % self._keep_every:
                gone = self.directory / f"{step}.deleted"  # a half-deleted one is no checkpoint
                (self.directory / str(step)).rename(gone)
                gone.rmtree()

    def _remove_leftovers(self) -> None:
        for path in self.directory.iterdir():
            if LEFTOVER.fullmatch(path.name):
                path.rmtree()


def read(directory: str, step: int | None = None) -> manifest.Listing:
    """Shape and dtype of every array of a checkpoint (the newest that can be read), by path."""
    return manifest.listing(_newest_document(directory, step))


def read_metadata(directory: str, step: int | None = None) -> dict[str, Any]:
    """The metadata of a checkpoint (the newest that can be read), without its arrays."""
    return _newest_document(directory, step)["metadata"]


def _newest_document(directory: str, step: int | None) -> dict[str, Any]:
    checkpoints = Checkpointer(directory)
    for candidate, path in checkpoints._candidates(step):
        document, why = reading.agree(manifest.read_document, path)
        if document is not None:
            return document
        checkpoints._damaged[candidate] = why
    raise AssertionError("_candidates raises where nothing is left")


def _check_arrays(step: int, arrays: Mapping[str, Array]) -> None:
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise UserError(f"step {step!r} must be an integer, 0 or more")
    if not arrays:
        raise UserError(f"nothing to save at step {step}")
    for path, array in arrays.items():
        if not isinstance(array, jax.Array):
            kind = type(array).__name__
            raise UserError(f"{path!r} is a {kind}, no jax.Array; use jnp.asarray")
        if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
            raise UserError(f"{path!r} is a typed key; save jax.random.key_data of it")
        if jax.process_count() > 1 and len(array.sharding.device_set) != jax.device_count():
            raise UserError(
                f"{path!r} is not on all devices; place it on the mesh (P() replicates)"
            )
        if not array.size:
            raise UserError(f"{path!r} has the shape {array.shape} and nothing to save")
    layout.layer_structs(arrays)  # here and not in the background, where it would fail too late


def _on_cpu(arrays: Mapping[str, Array]) -> bool:
    return all(d.platform == "cpu" for a in arrays.values() for d in a.sharding.device_set)


def _copy(arrays: Mapping[str, Array]) -> Callable[[], tuple[Arrays, dict[str, int]]]:
    """Copies the state to host memory now; the function that comes back gives layers and checksums.

    On a CPU the copy stays stacked, and all other work is left to that function.
    """
    if _on_cpu(arrays):
        copies = jax.block_until_ready(layout.copy(arrays))
        return lambda: (layout.unstack(copies), layout.Checksums(copies).result())
    checksums = layout.Checksums(arrays)
    single: Arrays = {}
    for group in layout.groups(arrays):
        on_device = layout.unstack(group)
        host = {p: a.sharding.with_memory_kind("pinned_host") for p, a in on_device.items()}
        single |= jax.block_until_ready(jax.device_put(on_device, host))
        del on_device  # before the next group takes its place
    return lambda: (single, checksums.result())


def _steps_in(directory: epath.Path) -> list[int]:
    """Complete steps in order: Orbax gives a directory its number when all is written."""
    if not directory.exists():
        return []
    remote = "://" in str(directory)  # object stores cannot rename: Orbax adds a file instead
    return sorted(
        int(p.name)
        for p in directory.iterdir()
        if re.fullmatch(r"\d+", p.name) and not (remote and not (p / "commit_success.txt").exists())
    )


def _numbered(name: str, count: int) -> str:
    return f"{name}.{count}" if count else name


def _say(line: str) -> None:
    if jax.process_index() == 0:
        print(line, flush=True)


def _finish_all() -> None:
    for checkpointer in list(_OPEN):
        try:
            checkpointer.wait()
        except UserError as error:
            print(error, flush=True)


# A save that is under way when the interpreter ends is waited for. This must run before
# concurrent.futures closes its pools, which Orbax writes with; atexit's own hooks run after.
_OPEN: "weakref.WeakSet[Checkpointer]" = weakref.WeakSet()
getattr(threading, "_register_atexit", atexit.register)(_finish_all)
