"""The list of papers is true: every record has its config, its tests and its line in the README."""

import ast
import importlib
import json
import pathlib
import subprocess
import sys
import textwrap

import pytest

from efficient import papers
from efficient.errors import UserError
from efficient.papers import Claim, Entry, Paper

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def listed() -> list[Entry]:
    return papers.entries()


def has_test(node: str, root: pathlib.Path = ROOT) -> bool:
    """Whether `path::function` or `path::Class::method`, parameters cut off, is in the source."""
    path, *names = node.partition("[")[0].split("::")
    if not names or not names[-1].startswith("test_") or not (root / path).is_file():
        return False
    scope = ast.parse((root / path).read_text(encoding="utf-8")).body
    for name in names:
        kind = ast.FunctionDef if name == names[-1] else ast.ClassDef
        found = [item for item in scope if isinstance(item, kind) and item.name == name]
        if not found:
            return False
        scope = found[0].body
    return True


def problems(entry: Entry, root: pathlib.Path = ROOT) -> list[str]:
    """What keeps a record from being true; one line each."""
    paper, found = entry.paper, []
    if paper.status == "todo":
        return found
    if entry.config is None:
        found.append(f"{paper.slug}: there is no configs/{paper.slug}.py; write the experiment")
    if not (root / f"tests/papers/test_{paper.slug}.py").is_file():
        found.append(f"{paper.slug}: there is no tests/papers/test_{paper.slug}.py; write it")
    if not paper.claims:
        found.append(f"{paper.slug}: no claim is recorded; add Paper(claims=(Claim(...), ...))")
    if not paper.source:
        found.append(f"{paper.slug}: add Paper(source=...), where the equations were read")
    for claim in paper.claims:
        if claim.test is not None and not has_test(claim.test, root):
            found.append(f"{paper.slug}: there is no test {claim.test}; mend Claim(test=...)")
        if claim.reached and claim.test is None:
            found.append(f"{paper.slug}: {claim.text!r} is reached without a test; name one")
        if not claim.reached and not claim.note:
            found.append(f"{paper.slug}: {claim.text!r} is not reached; say why in its note")
        if paper.status == "verified" and not claim.reached:
            found.append(f"{paper.slug}: {claim.text!r} is not reached; the status is 'equations'")
    return found


def test_list_of_papers():
    rows = papers.load_rows()
    assert len(rows) == 155 == len({row["slug"] for row in rows})
    assert all(set(row) == {"slug", "title", "family"} for row in rows)
    assert all(value and value == value.strip() for row in rows for value in row.values())
    assert all(row["slug"].isidentifier() for row in rows)


def test_records_are_true(listed):
    assert len(listed) == 155
    assert {entry.status for entry in listed} <= set(papers.STATUSES)
    found = [problem for entry in listed for problem in problems(entry)]
    assert not found, "\n".join(found)


def test_configs_and_paper_tests_have_a_record(listed):
    known = {entry.slug for entry in listed if entry.status != "todo"}
    tests = {path.stem.removeprefix("test_") for path in (ROOT / "tests/papers").glob("test_*.py")}
    lost = sorted(tests - known)
    assert not lost, f"add PAPER = Paper(slug, ...) to the techniques that tests/papers has: {lost}"


def test_readme_table_is_current(listed):
    readme = ROOT / "README.md"
    assert readme.is_file(), "the project has no README.md"
    table = papers.between_markers(readme.read_text(encoding="utf-8"))
    assert table == papers.markdown(listed), "README.md: run `make papers`"


def test_has_test_reads_the_source(tmp_path):
    source = """
    def test_plain(): ...
    def helper(): ...
    class TestGroup:
        def test_method(self): ...
    """
    (tmp_path / "test_it.py").write_text(textwrap.dedent(source))
    present = ("::test_plain", "::test_plain[a-1]", "::TestGroup::test_method")
    absent = ("", "::helper", "::test_method", "::TestGroup", "::TestOther::test_method")
    assert all(has_test("test_it.py" + node, tmp_path) for node in present)
    assert not any(has_test("test_it.py" + node, tmp_path) for node in absent)
    assert not has_test("test_other.py::test_plain", tmp_path)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({}, None),
        ({"status": "todo", "claims": (), "source": ""}, None),
        ({"status": "equations", "claims": (Claim("fast", note="needs 8 GPUs"),)}, None),
        ({"claims": ()}, "no claim"),
        ({"claims": (Claim("exact", reached=True),)}, "reached without a test"),
        ({"claims": (Claim("fast", note="needs 8 GPUs"),)}, "'fast' is not reached; the status"),
        ({"status": "equations", "claims": (Claim("fast"),)}, "say why in its note"),
        ({"claims": (Claim("exact", "tests/papers/test_x.py::test_y", True),)}, "there is no test"),
        ({"source": ""}, "where the equations were read"),
    ],
)
def test_problems_are_found(tmp_path, changes, problem):
    (tmp_path / "tests/papers").mkdir(parents=True)
    (tmp_path / "tests/papers/test_monarch.py").write_text("def test_exact(): ...\n")
    good = Claim("exact", "tests/papers/test_monarch.py::test_exact", True)
    fields = {"slug": "monarch", "status": "verified", "claims": (good,), "source": "the paper"}
    paper = Paper(**(fields | changes))
    entry = Entry("monarch", "Monarch", "matrix", paper, "efficient.x", "configs/monarch.py")
    found = problems(entry, tmp_path)
    assert (problem is None and not found) or any(problem in line for line in found)
    if paper.status != "todo":
        (tmp_path / "tests/papers/test_monarch.py").unlink()
        lost = Entry("monarch", "Monarch", "matrix", paper, "efficient.x")
        text = "\n".join(problems(lost, tmp_path))
        assert "configs/monarch.py" in text and "test_monarch.py" in text


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Builds a package of techniques from {path: source} and imports it."""

    def build(files: dict[str, str]):
        name = f"techniques_{tmp_path.name}"
        for path, source in {"__init__.py": "", **files}.items():
            file = tmp_path / name / path
            file.parent.mkdir(parents=True, exist_ok=True)
            header = "from efficient.papers import Claim, Paper\n"
            file.write_text(header + source.replace("PACKAGE", name))
            (file.parent / "__init__.py").touch()
        importlib.invalidate_caches()
        return importlib.import_module(name)

    monkeypatch.syspath_prepend(str(tmp_path))
    yield build
    for name in [name for name in sys.modules if name.startswith(f"techniques_{tmp_path.name}")]:
        del sys.modules[name]


def test_discovery(package):
    built = package(
        {
            "mixers/pool.py": "PAPER = Paper('a', 'verified')",
            "mixers/two.py": "PAPERS = (Paper('b', 'equations'), Paper('c', 'todo'))",
            "mixers/none.py": "",
            "mixers/deep/__init__.py": "from PACKAGE.mixers.deep.part import PAPER",
            "mixers/deep/part.py": "PAPER = Paper('d', 'todo')",
            "mixers/__main__.py": "raise SystemExit('a command was run')",
            "training/loop.py": "PAPER = Paper('e', 'todo')",
            "loose.py": "raise SystemExit('not in a slot')",
        }
    )
    found = papers.discover(built, "abcde")
    modules = {slug: module.removeprefix(built.__name__) for slug, (_, module) in found.items()}
    assert modules == {
        "a": ".mixers.pool",
        "b": ".mixers.two",
        "c": ".mixers.two",
        "d": ".mixers.deep.part",
    }
    assert found["b"][0] == Paper("b", "equations")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"mixers/m.py": "PAPER = Paper('monach', 'todo')"}, "did you mean 'monarch'"),
        (
            {f"mixers/{n}.py": "PAPER = Paper('monarch', 'todo')" for n in "xy"},
            r"two records, in \S+mixers.x and \S+mixers.y",
        ),
        ({"mixers/m.py": "import a_package_nobody_has"}, "mixers.m cannot be imported"),
        ({"mixers/m.py": "PAPER = Paper('monarch', 'verifed')"}, "did you mean 'verified'"),
    ],
)
def test_bad_records_are_refused(package, files, message):
    built = package(files)
    with pytest.raises(UserError, match=message):
        papers.discover(built, ["monarch", "hyena"])


def test_markdown_shows_what_is_begun():
    claims = (Claim("exact", "tests/papers/test_pool.py::test_exact", True), Claim("fast"))
    module = "efficient.training.metrics"  # any module whose file is known
    begun = Entry(
        "pool", "Pool | it", "mixer", Paper("pool", "equations", claims), module, "configs/pool.py"
    )
    done = Entry("other", "Other", "mixer", Paper("other", "verified"), module)
    waiting = Entry("later", "Later", "mixer", Paper("later", "todo"))
    importlib.import_module(module)
    lines = papers.markdown([begun, done, waiting]).splitlines()
    assert lines[0] == "2 of 3 papers: 1 verified, 1 equations."
    assert lines[4] == (
        "| Pool \\| it | training | [`training/metrics`](efficient/training/metrics.py) "
        "| [`pool`](configs/pool.py) | equations | [1 of 2](tests/papers/test_pool.py) |"
    )
    assert len(lines) == 6


def test_write_readme_replaces_only_the_table(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"# Title\n\n{papers.BEGIN}\nold\n{papers.END}\n\nThe end.\n")
    for table in ("line\n\n| new |", "| newer |"):
        papers.write_readme(readme, table)
        text = readme.read_text()
        assert papers.between_markers(text) == table and "old" not in text
        assert text.startswith("# Title\n\n") and text.endswith("\n\nThe end.\n")
    readme.write_text(f"{papers.END} {papers.BEGIN}")
    with pytest.raises(UserError, match="once each"):
        papers.write_readme(readme, "x")
    with pytest.raises(UserError, match=r"no ABSENT\.md"):
        papers.write_readme(tmp_path / "ABSENT.md", "x")


def test_command_lists_filters_and_names_what_is_near(listed, capsys):
    papers.main([])
    output = capsys.readouterr().out
    assert all(entry.slug in output for entry in listed)
    assert output.rstrip().endswith(papers.count_line(listed))
    for status in papers.STATUSES:
        papers.main(["--json", "--status", status])
        shown = json.loads(capsys.readouterr().out)
        slugs = [entry.slug for entry in listed if entry.status == status]
        assert [paper["slug"] for paper in shown] == slugs
        keys = {"slug", "title", "status", "config", "technique", "claims"}
        assert all(set(paper) == keys for paper in shown)
    papers.main(["flash_attention"])
    assert "IO-Awareness" in capsys.readouterr().out
    for arguments in (["flash_atention"], ["--markdown", "--status", "todo"]):
        with pytest.raises(SystemExit) as exit_info:
            papers.main(arguments)
        error = capsys.readouterr().err
        assert exit_info.value.code == 2
        assert error.startswith("error: ") and error.count("\n") == 1


def test_details_show_claims_and_departures():
    claim = Claim("exact", "tests/papers/test_pool.py::test_exact", True, "error 1e-7")
    paper = Paper("pool", "verified", (claim, Claim("fast")), "section 3", ("no bias",))
    text = papers.details(Entry("pool", "Pool", "mixer", paper, "efficient.mixers.pool"))
    for part in ("exact (error 1e-7)", claim.test, "open", "fast", "section 3", "no bias", "none"):
        assert part in text


def test_command_from_a_shell(listed):
    # Run as a script this module exists twice; records of the imported one are found all the same.
    command = [sys.executable, "-m", "efficient.papers", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert [paper["status"] for paper in json.loads(done.stdout)] == [e.status for e in listed]
