"""The command lines of train.py and eval.py: flags, errors in one line, processes."""

import glob
import importlib.util
import json
import math
import os
import pathlib
import re
import socket
import sys
import time
import traceback

from absl import flags, logging
from ml_collections import ConfigDict, config_flags
from ml_collections.config_flags.config_flags import UnsupportedOperationError

from configs import common
from efficient.cli import one_line
from efficient.errors import UserError, nearest

# How long a process may be silent before the others take it for dead.
HEARTBEAT_SECONDS = 30
# What collectives say when the other end is gone.
LOST = re.compile(r"gloo|connection|unavailable|heartbeat|deadline|socket|coordination", re.I)
DEAD = "task has failed"  # of a save that waited for it, too


def train(argv: list[str]) -> None:
    """`train.py`: runs, resumes or plans the experiment of --config."""
    _look_for_no_absent_tpu()
    values = flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config",
        None,
        "The experiment, configs/x.py:argument.",
        flag_values=values,
        sys_argv=argv,  # where it looks for --config.field=value
    )
    flags.DEFINE_string("workdir", None, "Folder of the run.", flag_values=values)
    flags.DEFINE_string(
        "plan", None, "Compile for this hardware and report: v5e:16x16, h200.", flag_values=values
    )
    flags.DEFINE_bool("json", False, "With --plan: print JSON.", flag_values=values)
    _define_processes(values)
    _parse(values, argv, required=("config",))
    config = _config(values)
    if values.plan:
        _plan(config, values.plan, values.json)
        return
    if values.json:
        raise UserError("--json is of --plan; metrics.jsonl has a run's figures as JSON")
    if not values.workdir:
        raise UserError("which folder? add --workdir=runs/NAME")
    if values.processes is None:
        _ask_for_cpu_devices(config)
    with _Processes(values):
        from efficient.training import loop

        loop.train(config, values.workdir)


def evaluate(argv: list[str]) -> None:
    """`eval.py`: metrics of a run's newest checkpoint as JSON, also by length, or a sample."""
    _look_for_no_absent_tpu()
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "Folder of the run.", flag_values=values)
    flags.DEFINE_string("prompt", None, "Continue this text.", flag_values=values)
    flags.DEFINE_integer("length", 100, "New tokens of the sample.", flag_values=values)
    flags.DEFINE_float(
        "temperature", 0.8, "Of the sample; 0 takes the likeliest.", flag_values=values
    )
    flags.DEFINE_list("lengths", None, "Lengths of context: 128,256,512.", flag_values=values)
    config_flags.DEFINE_config_file(
        "config",
        None,
        "Put the run's parameters into the model of this config instead of its own.",
        flag_values=values,
        sys_argv=argv,
    )
    _parse(values, argv, required=("workdir",))
    path = pathlib.Path(values.workdir) / "config.json"
    if not path.exists():
        raise UserError(
            f"{values.workdir} holds no run (no config.json); name the --workdir of one"
        )
    try:
        config = ConfigDict(dict(json.loads(path.read_text())))
    except (ValueError, TypeError):
        raise UserError(f"{path} is damaged; start the run's train.py again to mend it") from None
    if values.config is not None:
        config = _config(values)
    else:
        for name, default in common.defaults().items():  # a run older than a field
            if name not in config:
                config[name] = default
        _fit_mesh(config)
    if values.lengths is not None:
        _evaluate_lengths(config, values, argv)
        return
    from efficient.training import loop

    loop.evaluate(config, values.workdir, values.prompt, values.length, values.temperature)


def _ask_for_cpu_devices(config: ConfigDict) -> None:
    """As many devices on a CPU as the mesh wants, so that every mesh runs on a laptop.

    They share its cores. Accelerators are not touched by it.
    """
    count = math.prod(n for n in config.mesh.values() if isinstance(n, int) and n > 1)
    if count > 1 and "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        import jax

        jax.config.update("jax_num_cpu_devices", count)


def _fit_mesh(config: ConfigDict) -> None:
    """Spreads parameters over the devices that are here where the run's mesh does not fit them."""
    from efficient.parallel.mesh import make_mesh

    try:
        make_mesh(config.get("mesh", {}))
    except UserError:
        config.mesh = {"data": 1, "fsdp": -1}


def _evaluate_lengths(config: ConfigDict, values: flags.FlagValues, argv: list[str]) -> None:
    try:
        lengths = [int(n) for n in values.lengths]
    except ValueError:
        raise UserError(f"--lengths={','.join(values.lengths)}: give numbers, 128,256") from None
    given = next((a.split("=", 1)[1] for a in argv if re.match(r"--?config=", a)), None)
    from efficient.training import lengths as by_length

    by_length.evaluate(config, values.workdir, lengths, given or "as trained")


def _look_for_no_absent_tpu() -> None:
    """Where libtpu is installed for plans only, JAX would look for a TPU at length and aloud."""
    if "JAX_PLATFORMS" in os.environ or not importlib.util.find_spec("libtpu"):
        return
    if glob.glob("/dev/accel*") or glob.glob("/dev/vfio/*"):
        return
    cuda = any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13))
    os.environ["JAX_PLATFORMS"] = "cuda,cpu" if cuda else "cpu"


def _define_processes(values: flags.FlagValues) -> None:
    flags.DEFINE_bool(
        "distributed",
        False,
        "Several processes, found by the platform (TPU pods, Slurm).",
        flag_values=values,
    )
    flags.DEFINE_string("coordinator", None, "host:port of process 0.", flag_values=values)
    flags.DEFINE_integer("processes", None, "How many processes run.", flag_values=values)
    flags.DEFINE_integer("process", None, "Number of this one, from 0.", flag_values=values)
    flags.DEFINE_integer(
        "wait", 300, "Seconds in which all processes must have started.", flag_values=values
    )


class _Processes:
    """Joins the processes of a run before JAX starts, and leaves them at its end."""

    def __init__(self, values: flags.FlagValues):
        named = (values.coordinator, values.processes, values.process)
        if any(n is not None for n in named) and any(n is None for n in named):
            raise UserError("give --coordinator=HOST:PORT, --processes=N and --process=I together")
        self.join = values.distributed or values.coordinator is not None
        self.named = named
        self.limits = {
            "initialization_timeout": values.wait,
            "heartbeat_timeout_seconds": HEARTBEAT_SECONDS,
        }

    def __enter__(self):
        if not self.join:
            return
        import jax

        coordinator, processes, process = self.named
        if os.environ.get("JAX_PLATFORMS", "").startswith("cpu"):
            jax.config.update("jax_cpu_collectives_implementation", "gloo")
        try:
            if coordinator is None:
                jax.distributed.initialize(**self.limits)
            else:
                if process:  # JAX would end the process with a stack trace
                    _reach(coordinator, self.limits["initialization_timeout"])
                jax.distributed.initialize(coordinator, processes, process, **self.limits)
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"the processes did not meet: {str(error).splitlines()[0]}; check that all of them"
                " run, and that --coordinator is reachable through the firewall"
            ) from None

    def __exit__(self, kind, error, trace):
        """Leaves together; after an error the others may never come, so this process ends now."""
        if not self.join:
            return
        import jax

        if error is None or isinstance(error, SystemExit):
            jax.distributed.shutdown()
            return
        status, text = 2, str(error)
        lost = isinstance(error, jax.errors.JaxRuntimeError) and LOST.search(text)
        if lost or DEAD in text:
            print(
                f"error: another process of this run has died ({text.splitlines()[0][:200]});"
                " start all of them again with the same command, which goes on from the newest"
                " checkpoint",
                file=sys.stderr,
                flush=True,
            )
        elif (line := one_line(error)) is not None:
            print(f"error: {line}", file=sys.stderr, flush=True)
        else:
            status = 1
            traceback.print_exception(kind, error, trace)
        sys.stdout.flush()
        os._exit(status)


def _reach(coordinator: str, seconds: float) -> None:
    """Returns when process 0 listens at host:port."""
    host, _, port = coordinator.rpartition(":")
    if not port.isdigit():
        raise UserError(f"--coordinator={coordinator!r} must be HOST:PORT")
    until, why = time.monotonic() + seconds, ""
    while time.monotonic() < until:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:
            why = str(error)
            time.sleep(0.5)
    raise UserError(
        f"the processes did not meet in {seconds} s: process 0 does not answer at {coordinator}"
        f" ({why}); start it, and check the firewall"
    )


def _parse(values: flags.FlagValues, argv: list[str], required: tuple[str, ...]) -> None:
    """Parses; whatever is wrong on the command line or in the config file is one line."""
    logging.set_verbosity(logging.ERROR)  # config_flags' warnings are errors here, told below
    try:
        left = values(argv)
    except UserError:
        raise
    except UnsupportedOperationError as error:
        name = re.search(r"field (config\.\S+)", str(error))
        raise UserError(
            f"{name[1] if name else 'this field'} cannot be set on the command line; write it in"
            " the config file, or give the file an argument for it"
        ) from None
    except flags.Error as error:
        if "parsing config file" in str(error):  # a traceback as text, of an error in that file
            raise UserError(_why(error, argv)) from error
        if group := re.match(r"flag --(\S+?)=.* as a ConfigDict", str(error)):
            raise UserError(
                f"--{group[1]} is a group; set a field, --{group[1]}.name=..."
            ) from None
        raise UserError(f"{str(error).rstrip(' ?')}; see --help") from None
    except Exception as error:
        raise UserError(_why(error, argv)) from error
    if len(left) > 1:
        raise UserError(f"what is {left[1]!r}? options are --name=value; see --help")
    for name in required:
        if not values[name].present:
            raise UserError(f"--{name} is missing; see the top of {pathlib.Path(argv[0]).name}")


def _config(values: flags.FlagValues) -> ConfigDict:
    """What the config file gave."""
    config = values.config
    if not isinstance(config, ConfigDict):
        _check_file(config_flags.get_config_filename(values["config"]))
        raise UserError(f"get_config must return a ConfigDict, got {type(config).__name__}")
    return config


def _check_file(name: str) -> None:
    """Says which config files there are where `name` is none."""
    path = pathlib.Path(name)
    if path.is_file():
        return
    folders = {pathlib.Path("configs"), path.parent} - {pathlib.Path()}
    known = [p.as_posix() for folder in folders for p in folder.glob("[!_]*.py")]
    raise UserError(f"no config file {name!r}; {nearest(name, known)}")


def _why(error: Exception, argv: list[str]) -> str:
    """What is wrong with a config file, or with an override of one of its fields."""
    given = next((a.split("=", 1)[1] for a in argv if re.match(r"--?config=", a)), "")
    file = given.split(":")[0]
    names = [a.split("=")[0].lstrip("-") for a in argv if re.match(r"--?config\.", a)]
    cause: BaseException | None = error
    while cause is not None:  # config_flags wraps some errors in others
        if isinstance(cause, UserError):
            return str(cause)
        if isinstance(cause, SyntaxError) and cause.filename != "<unknown>":
            return f"{file} line {cause.lineno}: {cause.msg}"
        lines = [f.lineno for f in traceback.extract_tb(cause.__traceback__) if f.filename == file]
        if lines and "parsing config file" not in str(cause):
            return f"{file} line {lines[-1]}: {type(cause).__name__}: {cause}"
        cause = cause.__cause__ or cause.__context__
    named = re.match(r"\W*(\w+)", str(error))
    field = next((n for n in names if named and named[1] in n.split(".")), None)
    if field and isinstance(error, KeyError | AttributeError):
        near = re.search(r'"(\w+)" instead of', str(error))
        hint = f"did you mean {near[1]!r}?" if near else "see configs/common.py"
        return f"--{field}: the config has no field {named[1]!r}; {hint}"
    lists = "an element of a list is --config.phases[0]"
    if unread := re.match("Could not parse '(.*?)'", str(error)):
        return f"--config.{unread[1]} is no path of a field; {lists}"
    if names and isinstance(error, IndexError | TypeError):  # and in no line of the file
        return f"{', '.join(f'--{name}' for name in names)}: {error}; {lists}"
    return f"{file}: {type(error).__name__}: {error}"


def _plan(config: ConfigDict, target: str, as_json: bool) -> None:
    from efficient.planning import hardware

    hardware.prepare_environment()
    from efficient.training.plan import plan_config

    report = plan_config(config, target)
    print(report.to_json() if as_json else report.to_text())
    if not report.fits:
        raise SystemExit(3)
