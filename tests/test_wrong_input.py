"""Wrong input: one line that says what to mend, status 2, and nothing touched in the workdir."""

import errno
import functools
import os
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

import eval as eval_script
import train as train_script
from configs import common
from efficient.cli import main_guard
from efficient.init import ZEROS
from efficient.registry import register
from efficient.scope import Context, Scope, buffer, param
from efficient.training import loop

HEADER = """
import tiny
from configs import common

def get_config(arg=None):
    arg = common.parse(arg, depth=2)
    config = tiny.config(depth=arg.depth)
"""


@register("mixer", "test_both_ways", causal=(False,))
class BothWays(nnx.Module):
    """A mixer that sees the future."""

    def __init__(self, scope: Scope, width: int, causal: bool):
        del scope, width, causal

    def __call__(self, x, context: Context):
        del context
        return x - jnp.mean(x, axis=1, keepdims=True)


HELD = {
    "jax": lambda: jnp.ones(3),
    "numpy": lambda: np.ones(3),
    "variable": lambda: nnx.Param(jnp.ones(3)),
    "linear": lambda: nnx.Linear(2, 2, rngs=nnx.Rngs(0)),
    "list of arrays": lambda: nnx.List([jnp.ones(3)]),
    "list of parameters": lambda: nnx.List([param((3,), ZEROS)]),
    "dict of modules": lambda: nnx.data({"inner": nnx.Module()}),
    "lambda": lambda: param((3,), lambda key, shape, dtype: jnp.ones(shape, dtype)),
    "closure": lambda: param((3,), jax.nn.initializers.normal(0.02)),
    "partial": lambda: buffer((3,), functools.partial(jax.random.uniform, minval=-1.0)),
}


@register("channel", "test_holds")
class Holds(nnx.Module):
    """A channel mixer with one attribute."""

    def __init__(self, scope: Scope, width: int, *, what: str):
        del scope, width
        self.x = HELD[what]()


@pytest.fixture
def write(tmp_path):
    """Writes a config file whose `get_config` runs the given lines; gives its path."""

    def write(*lines: str, header: str = HEADER) -> str:
        path = tmp_path / "mine.py"
        path.write_text(header + "".join(f"    {line}\n" for line in (*lines, "return config")))
        return str(path)

    return write


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A workdir with two checkpoints."""
    folder = tmp_path_factory.mktemp("finished")
    loop.train(tiny.config(common.phase(2), checkpoint_every=1), str(folder))
    return folder


def contents(folder):
    """All files below a folder with their bytes."""
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def refused(capsys, main, *argv) -> str:
    """The one line with which a command refuses its arguments."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as raised:
        main(["train.py", *argv])
    _, err = capsys.readouterr()
    assert raised.value.code == 2, err
    return one_line(err)


def one_line(err: str) -> str:
    assert re.fullmatch(r"error: [^\n]{10,}\n", err), err
    assert "Traceback" not in err
    return err.removeprefix("error: ").strip()


SMOKE = "--config=configs/quickstart.py:smoke"
# What is on the command line (but the workdir), and what the line must say.
ARGUMENTS = {
    "no config": ((), "--config is missing"),
    "unknown config file": (
        ("--config=configs/quickstrt.py",),
        "no config file 'configs/quickstrt.py'; did you mean 'configs/quickstart.py'",
    ),
    "config by name alone": (
        ("--config=quickstart",),
        "no config file 'quickstart'; did you mean 'configs/quickstart.py'",
    ),
    "group of fields": (
        (SMOKE, "--config.data=digits"),
        r"is a group; set .*--config.data.name=\.\.\.",
    ),
    "config argument": (("--config=configs/quickstart.py:smke",), "did you mean 'smoke'"),
    "type of a config argument": (("--config=configs/lamb.py:batch_size=x",), "'x' is no int"),
    "unknown field": ((SMOKE, "--config.modl.width=3"), "--config.modl.*did you mean 'model'"),
    "unknown inner field": ((SMOKE, "--config.model.wdth=3"), "did you mean 'width'"),
    "element of a list": (
        (SMOKE, "--config.phases.0.steps=3"),
        r"phases\.0\.steps is no path of a field.*phases\[0\]",
    ),
    "no element of a list": (
        (SMOKE, "--config.phases[7].steps=3"),
        r"s\[7\]\.steps: .*out of range",
    ),
    "field of a list": ((SMOKE, "--config.phases.steps=3"), r"phases\.steps: .*phases\[0\]"),
    "type of a field": ((SMOKE, "--config.batch_size=many"), r"batch_size.*'many'"),
    "a list on the command line": ((SMOKE, "--config.phases=3"), "config.phases cannot be set on"),
    "a field below its range": ((SMOKE, "--config.log_every=0"), "log_every must be .* 1 or more"),
    "flag": ((SMOKE, "--wrkdir=x"), "'wrkdir'.*[Dd]id you mean.*workdir"),
    "left over": ((SMOKE, "smoke"), "what is 'smoke'"),
    "half of the processes' flags": ((SMOKE, "--processes=2"), "--coordinator=.* together"),
    "dtype": ((SMOKE, "--config.compute_dtype=bfloat"), "did you mean 'bfloat16'"),
    "host": ((SMOKE, "--config.model.name=decodr"), "did you mean 'decoder'"),
    "data source": ((SMOKE, "--config.data.name=stdlb"), "did you mean 'stdlib'"),
    "width": ((SMOKE, "--config.model.width=63"), "63 does not divide into 2 heads"),
    "devices": ((SMOKE, "--config.mesh.fsdp=3"), "fsdp=3 does not divide 8 devices"),
    "batch on the mesh": ((SMOKE, "--config.batch_size=6"), "6 examples does not divide over 8"),
    "microbatches": ((SMOKE, "--config.accumulate=3"), "does not divide into config.accumulate=3"),
    "mesh axis": (("--config=configs/quickstart.py:smoke", "--config.mesh.fdsp=2"), "'fsdp'"),
    "two open axes": ((SMOKE, "--config.mesh.fsdp=-1"), "at most one is -1"),
    "a long sample": (
        (SMOKE, "--config.sample.length=64", "--config.batch_size=8"),
        "exceed model.max_length=64",
    ),
    "other run": (
        (SMOKE, "--config.batch_size=8", "--config.init_from=/nowhere"),
        "name the workdir of a finished run",
    ),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_arguments(case, tmp_path, capsys):
    flags, message = ARGUMENTS[case]
    folder = tmp_path / "run"
    found = refused(capsys, train_script.main, *flags, f"--workdir={folder}")
    assert re.search(message, found), found
    if case != "other run":  # the run itself was fine until it wanted the other one
        assert not folder.exists()


# Lines of a config file, and what the answer must say.
FILES = {
    "technique": (
        "config.rules = [{'at': r'blocks/.*/mixer', 'use': 'atention'}]",
        r"config.rules\[0\].*unknown technique 'atention'; did you mean 'attention'",
    ),
    "argument of a technique": (
        "config.rules = [{'at': r'blocks/.*/mixer', 'use': 'attention', 'haeds': 2}]",
        r"config.rules\[0\].*no argument 'haeds'; did you mean 'heads'",
    ),
    "type of an argument": (
        "config.rules = [{'at': r'blocks/.*/mixer', 'use': 'attention', 'heads': '2'}]",
        "attention.heads must be int.*, got '2'",
    ),
    "rule that matches nothing": (
        "config.rules += [{'at': r'block/\\d+/mixer', 'use': 'attention'}]",
        r"config.rules\[6\]: 'block/\\d\+/mixer' matches no mixer slot; did you mean 'blocks/0/mix",
    ),
    "slot of another kind": (
        "config.rules = [{'at': r'blocks/\\d+/channel', 'use': 'attention'}]",
        r"'blocks/\\d\+/channel' matches only channel slots, but 'attention' is a mixer",
    ),
    "rule without use": (
        "config.rules = [{'at': 'embed', 'user': 'table'}]",
        "'use' is missing; you wrote 'user'$",
    ),
    "rule by name alone": (
        "config.rules = ['attention']",
        r"config.rules\[0\] must be \{'at': .*not 'attention'",
    ),
    "pattern of another type": (
        "config.rules = [{'at': 3, 'use': 'table'}]",
        r"config.rules\[0\]: 'at' must be a string, not 3",
    ),
    "pattern": (
        "config.rules = [{'at': r'(\\d', 'use': 'table'}]",
        r"'\(\\d' is no regular expression",
    ),
    "grid of a sequence": (
        "config.rules = [{'at': 'final_norm', 'use': 'group_norm'}]",
        r"rules\[0\].*final_norm: 'group_norm' needs an image's grid.*use it in model.name=vision",
    ),
    "declaration": (
        "from efficient.registry import register; register('mixer', 'test_new', segment=False)",
        "mixer 'test_new' declares 'segment', .*did you mean 'segments'",
    ),
    "argument by position": (
        "from efficient.registry import register\n"
        "    register('channel', 'test_new')(lambda scope, width, hidden: None)",
        r"channel 'test_new' takes hidden by position; put what a config may set after '\*'",
    ),
    "signature": (
        "from efficient.registry import register\n"
        "    register('channel', 'test_new')(lambda scope, *, hidden: None)",
        r"channel 'test_new' must take \(scope, width\) before '\*'",
    ),
    **{
        f"module that holds: {what}": (
            f"config.rules = [{{'at': '.*/channel', 'use': 'test_holds', 'what': {what!r}}}]",
            message,
        )
        for what, message in {
            "jax": r"^blocks/0/channel/x is a bare array; declare it with param\(shape, init\), or",
            "numpy": "^blocks/0/channel/x is a bare array; declare it with param",
            "variable": "^blocks/0/channel/x is an array without an initializer; declare it with",
            "linear": "^blocks/0/channel/x/kernel is an array without an initializer; declare",
            "list of arrays": "^blocks/0/channel/x/0 is a bare array; declare it with param",
            "list of parameters": "^blocks/0/channel/x/0 is in a list .* an attribute of its own",
            "dict of modules": "^blocks/0/channel/x/inner is in a dict .*put modules into one nnx",
            "lambda": "blocks/0/channel: the initializer '.*<lambda>' equals no other.*Normal",
            "closure": "blocks/0/channel: the initializer 'normal.<locals>.init' equals no other",
            "partial": "blocks/0/channel: the initializer 'partial' equals no other",
        }.items()
    },
    "combination": (
        "config.rules = [{'at': r'blocks/\\d+/mixer', 'use': 'test_both_ways'}]",
        "host is causal and 'test_both_ways' is not",
    ),
    "heads": (
        "config.rules = [{'at': r'blocks/.*/mixer', 'use': 'attention', 'heads': 3}]",
        "32 does not divide into 3 heads",
    ),
    "no heads": (
        "config.rules = [{'at': r'blocks/.*/mixer', 'use': 'attention', 'heads': 0}]",
        "blocks/0/mixer: heads must be 1 or more, got 0",
    ),
    "size below one": (
        "config.rules = [{'at': r'blocks/.*/channel', 'use': 'mlp', 'hidden': -8}]",
        r"blocks/0/channel.*shape \(32, -8\); sizes must be 1 or more",
    ),
    "no layers": ("config.model.depth = 0", "config.model.depth must be 1 or more, got 0"),
    "key-value heads": (
        "config.rules = [{'at': r'.*/mixer', 'use': 'attention', 'heads': 4, 'kv_heads': 3}]",
        "4 heads do not divide into 3 kv_heads",
    ),
    "activation": (
        "config.rules = [{'at': r'.*/channel', 'use': 'mlp', 'activation': 'glu'}]",
        "unknown activation 'glu'; did you mean 'gelu'",
    ),
    "placement of nothing": (
        "config.placement = [{'at': r'embd/tabl\\w', 'spec': ['fsdp']}]",
        r"placement\[0\]: 'embd/tabl\\w' matches no parameter; did you mean 'embed/table'",
    ),
    "axis of a placement": (
        "config.placement = [{'at': 'embed/table', 'spec': ['tenser']}]",
        r"placement\[0\]: no mesh axis 'tenser'; did you mean 'tensor'",
    ),
    "an axis twice": (
        "config.placement = [{'at': 'embed/table', 'spec': ['fsdp', 'fsdp']}]",
        "a mesh axis can split one dimension only",
    ),
    "pattern of a placement": (
        "config.placement = [{'at': r'*\\d', 'spec': ['fsdp']}]",
        r"placement\[0\]: '\*\\d' is no pattern",
    ),
    "text path": (
        "config.data = {'name': 'text', 'path': '/nowhere', 'length': 32}",
        "no file or folder at data.path=/nowhere",
    ),
    "argument of the data": (
        "config.data = {'name': 'copying', 'lenght': 32}",
        "takes no 'lenght'; did you mean 'length'",
    ),
    "data without name": ("config.data = {'length': 32}", "config.data: which"),
    "data of another kind": (
        "config.data = {'name': 'digits'}; config.model.vocab_size = 16",
        "look for 'tokens' in a batch, but data 'digits' gives image, label",
    ),
    "small vocabulary": (
        "config.model.vocab_size = 5",
        "config.model.vocab_size=5 is less than the 16 of the data",
    ),
    "long examples": ("config.model.max_length = 16", "32 positions but learned positions for 16"),
    "parameters that match nothing": (
        "config.phases = [common.phase(2, parameters=[{'at': r'head/\\w', 'train': False}])]",
        r"phases\[0\].parameters\[0\]: 'head/\\w' matches no parameter",
    ),
    "pattern of parameters": (
        "config.phases = [common.phase(2, parameters=[{'at': r'(\\d', 'train': False}])]",
        r"phases\[0\].parameters\[0\].*: '\(\\d' is no regular expression",
    ),
    "parameters without at": (
        "config.phases = [common.phase(2, parameters=[{'train': False}])]",
        "a rule needs 'at'",
    ),
    "field of parameters": (
        "config.phases = [common.phase(2, parameters=[{'at': '.*', 'trian': False}])]",
        "no field 'trian'; did you mean 'train'",
    ),
    "partial decay": (
        "config.phases = [common.phase(2, parameters=[{'at': '.*', 'weight_decay': 0.5}])]",
        "weight_decay is 0 .* or 1",
    ),
    "everything frozen": (
        "config.phases = [common.phase(2, parameters=[{'at': '.*', 'train': False}])]",
        "every parameter is frozen",
    ),
    "optimizer": (
        "config.phases = [common.phase(2, optimizer={'name': 'adamv', 'learning_rate': 1.0})]",
        r"phases\[0\].optimizer: unknown optimizer 'adamv'; did you mean 'adam'",
    ),
    "argument of an optimizer": (
        "o = {'name': 'adamw', 'learning_rate': 1e-3, 'beta1': 0.9}\n"
        "    config.phases = [common.phase(2, optimizer=o)]",
        "'adamw' has no argument 'beta1'",
    ),
    "learning rate": (
        "o = {'name': 'adamw', 'learning_rate': 'fast'}\n"
        "    config.phases = [common.phase(2, optimizer=o)]",
        "learning_rate must be a number or a schedule, got 'fast'",
    ),
    "no learning rate": (
        "config.phases = [common.phase(2, optimizer={'name': 'adamw'})]",
        "learning_rate is missing",
    ),
    "argument of a schedule": (
        "o = {'name': 'adamw', 'learning_rate': {'name': 'cosine', 'peek': 1.0}}\n"
        "    config.phases = [common.phase(2, optimizer=o)]",
        r"optimizer.learning_rate: 'cosine' has no argument 'peek'; did you mean 'peak'",
    ),
    "argument of an objective": (
        "config.phases = [common.phase(2, objective={'name': 'next_token', 'zloss': 1.0})]",
        "'next_token' has no argument 'zloss'; did you mean 'z_loss'",
    ),
    "objective by name alone": (
        "config.phases = [common.phase(2, objective='next_token')]",
        r"phases\[0\].objective: which objective\? write {'name'",
    ),
    "objective of other data": (
        "config.phases = [common.phase(2, objective={'name': 'classification'})]",
        "'classification' look for 'label' in a batch",
    ),
    "objective of a later phase": (
        "config.phases = [common.phase(2), common.phase(2, objective={'name': 'classification'})]",
        r"phases\[1\].*'classification' look for 'label' in a batch",
    ),
    "selection": (
        "config.phases = [common.phase(2), common.phase(2, selection={'name': 'data_dite'})]",
        r"phases\[1\].selection: unknown selection 'data_dite'; did you mean 'data_diet'",
    ),
    "selection before training": (
        "config.phases = [common.phase(2, selection={'name': 'data_diet'})]",
        r"phases\[0\].selection: nothing has been trained yet",
    ),
    "selection by labels": (
        "config.phases = [common.phase(2), common.phase(2, selection={'name': 'data_diet'})]",
        r"phases\[1\].selection: 'data_diet' needs 'label'.*gives targets, tokens",
    ),
    "surgery": (
        "config.phases = [common.phase(2, surgery=[{'name': 'lora', 'at': r'\\d/nothing'}])]",
        r"phases\[0\].surgery\[0\]: surgery at '\\d/nothing' matches nothing",
    ),
    "merge of nothing": (
        "config.phases = [common.phase(2, surgery=[{'name': 'merge', 'at': r'.*/\\w'}])]",
        r"phases\[0\].surgery\[0\]: merge at '\.\*/\\w' matches no adapter",
    ),
    "field of a phase": ("config.phases = [common.phase(2, optimiser={})]", "mean 'optimizer'"),
    "field of a phase by hand": (
        "config.phases = [{'steps': 2, 'clp': 1.0}]",
        r"phases\[0\] has no field 'clp'; did you mean 'clip'",
    ),
    "steps": ("config.phases = [{'clip': 1.0}]", r"phases\[0\].steps must be a number of steps"),
    "average": ("config.phases = [common.phase(2, ema=1.5)]", "ema must be a decay between 0 and"),
    "no phases": ("config.phases = []", "config.phases is empty"),
    "field of the config": ("config.bacth_size = 8", "no field 'bacth_size'; did you mean 'batch"),
    "type in the file": ("config.batch_size = 'many'", "mine.py line 8: TypeError: .*batch_size"),
    "profile": ("config.profile = [3, 1]", r"config.profile must be \[first, last\] steps, got"),
    "sample of no text": ("config.sample.length = 4", "only a decoder of text gives samples"),
    "remat": ("config.model.remat = 'ful'", "did you mean 'full'"),
    "import": ("config.imports = ['nothing_here']", "cannot import 'nothing_here'"),
    "own bug": ("config.batch_size = {}['a']", "mine.py line 8: KeyError: 'a'"),
}


@pytest.mark.parametrize("case", FILES)
def test_config_files(case, write, tmp_path, capsys):
    line, message = FILES[case]
    folder = tmp_path / "run"
    found = refused(capsys, train_script.main, f"--config={write(line)}", f"--workdir={folder}")
    assert re.search(message, found), found
    assert not (folder / "checkpoints").exists()


def test_a_config_file_that_is_no_python(write, tmp_path, capsys):
    path = write(header="def get_config(arg=None)\n")
    found = refused(capsys, train_script.main, f"--config={path}", f"--workdir={tmp_path / 'run'}")
    assert re.search(r"mine.py line 1: expected ':'", found)
    path = write(header="import nothing_here\ndef get_config():\n")
    found = refused(capsys, train_script.main, f"--config={path}", f"--workdir={tmp_path / 'run'}")
    assert re.search(r"mine.py line 1: .*nothing_here", found)
    path = write(header="x = 1\nif True:\n    config = {}\ndef f(config):\n")
    # a process of its own: this one remembers the `get_config` of the files before
    command = tiny.command(tiny.TRAIN, f"--config={path}", f"--workdir={tmp_path / 'run'}")
    status, _, err = tiny.finish(command)
    assert status == 2
    assert "get_config" in one_line(err)
    path = write("return None", header="def get_config():\n")
    found = refused(capsys, train_script.main, f"--config={path}", f"--workdir={tmp_path / 'run'}")
    assert found == "get_config must return a ConfigDict, got NoneType"


def test_a_missing_workdir(capsys):
    assert "add --workdir=" in refused(capsys, train_script.main, SMOKE)


def test_a_workdir_that_cannot_be(write, tmp_path, capsys):
    config, file = write(), tmp_path / "file"
    file.write_text("")
    found = refused(capsys, train_script.main, f"--config={config}", f"--workdir={file}")
    assert "file is a file; --workdir names the folder of a run" in found
    found = refused(capsys, train_script.main, f"--config={config}", f"--workdir={file}/run")
    assert re.search(r"cannot write .*file/run/config.json: Not a directory", found)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.ENOENT])
def test_what_a_disk_answers_is_one_line_and_what_is_a_bug_is_not(number, capsys):
    @main_guard
    def main(argv):
        raise OSError(number, os.strerror(number), "metrics.jsonl")

    if number == errno.ENOENT:  # of a file that the project itself looked for
        with pytest.raises(FileNotFoundError):
            main([])
    else:
        assert f"{os.strerror(number)}: metrics.jsonl" in refused(capsys, main)


def test_a_workdir_of_another_config_stays_as_it_is(write, finished, capsys):
    before = contents(finished)
    path = write("config.phases = [common.phase(3)]", "config.checkpoint_every = 1")
    found = refused(capsys, train_script.main, f"--config={path}", f"--workdir={finished}")
    assert re.search(r"holds a run with another config\.phases.*use a new --workdir", found)
    assert contents(finished) == before


def test_the_config_of_a_run_is_known_from_its_checkpoint_too(write, finished, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    (folder / "config.json").write_text('{"seed"')
    path = write("config.phases = [common.phase(3)]", "config.checkpoint_every = 1")
    found = refused(capsys, train_script.main, f"--config={path}", f"--workdir={folder}")
    assert re.search(r"holds a run with another config\.phases.*use a new --workdir", found)
    loop.train(tiny.config(common.phase(2), checkpoint_every=1), str(folder))
    assert "damaged" not in refused(capsys, eval_script.main, f"--workdir={folder}", "--lengths=0")


def test_a_config_that_never_began_to_train_can_be_mended(write, tmp_path, capsys):
    flags = [f"--workdir={tmp_path / 'run'}"]
    path = write("config.init_from = '/nowhere'")
    refused(capsys, train_script.main, f"--config={path}", *flags)
    assert (tmp_path / "run" / "config.json").exists()
    path = write("config.init_from = '/nowhere/else'")
    assert "/nowhere/else" in refused(capsys, train_script.main, f"--config={path}", *flags)


@pytest.mark.parametrize("script", ["train", "eval"])
def test_damaged_checkpoints_stay_as_they_are(script, write, finished, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    for step in (1, 2):
        (folder / "checkpoints" / str(step) / "metadata" / "metadata").write_text("{")
    before = contents(folder / "checkpoints")
    path = write("config.phases = [common.phase(2)]", "config.checkpoint_every = 1")
    main = {"train": train_script.main, "eval": eval_script.main}[script]
    flags = [f"--config={path}"] if script == "train" else []
    found = refused(capsys, main, *flags, f"--workdir={folder}")
    assert re.search(r"every checkpoint in .* is damaged \(2: .*1: ", found), found
    assert contents(folder / "checkpoints") == before


def test_eval_of_no_run(tmp_path, finished, capsys):
    assert "--workdir is missing" in refused(capsys, eval_script.main)
    found = refused(capsys, eval_script.main, f"--workdir={tmp_path}")
    assert "holds no run (no config.json)" in found
    shutil.copy(finished / "config.json", tmp_path / "config.json")
    found = refused(capsys, eval_script.main, f"--workdir={tmp_path}")
    assert "holds no checkpoint yet; train first" in found
    (tmp_path / "config.json").write_text("{")
    assert "is damaged" in refused(capsys, eval_script.main, f"--workdir={tmp_path}")
    found = refused(capsys, eval_script.main, f"--workdir={finished}", "--prompt=a")
    assert "only a decoder of text gives samples" in found


@pytest.mark.parametrize("script", ["train", "eval"])
def test_as_a_command(script, tmp_path):
    flags = ["--config=configs/quickstart.py:smoke,deep"] if script == "train" else []
    command = {"train": tiny.TRAIN, "eval": tiny.EVAL}[script]
    status, out, err = tiny.finish(tiny.command(command, *flags, f"--workdir={tmp_path / 'x'}"))
    assert (status, out) == (2, "")
    one_line(err)
    assert not (tmp_path / "x").exists()
