"""The papers this project owes, and how far each has come.

    python -m efficient.papers                     every paper with its status
    python -m efficient.papers monarch             one paper: its claims, tests and departures
    python -m efficient.papers --status verified   only those (also `equations`, `todo`)
    python -m efficient.papers --json              for programs
    python -m efficient.papers --markdown          the table of the README
    python -m efficient.papers --write-readme      that table put into README.md

`papers.tsv` lists the papers. The file that holds a technique also holds its record,
`PAPER = Paper(...)`, or `PAPERS = (...)` where it serves several papers.
"""

import argparse
import collections
import csv
import dataclasses
import importlib
import json
import os
import pathlib
import pkgutil
import sys
import types
from collections.abc import Iterable, Sequence

from efficient.cli import main_guard, text_table
from efficient.errors import UserError, nearest

ROOT = pathlib.Path(__file__).resolve().parents[1]
STATUSES = ("verified", "equations", "todo")
BEGIN, END = "<!-- papers:begin -->", "<!-- papers:end -->"

# What a technique replaces, by the package of `efficient` that holds it.
REPLACES = {
    "mixers": "attention",
    "channels": "MLP",
    "linears": "dense layer",
    "norms": "normalization",
    "wiring": "residual wiring",
    "embeddings": "embedding",
    "objectives": "loss",
    "optimizers": "optimizer",
    "schedules": "learning-rate schedule",
    "selection": "training examples",
    "surgery": "whole model (surgery)",
    "parallel": "placement on devices",
    "decoding": "generation",
    "data": "input pipeline",
}


@dataclasses.dataclass(frozen=True)
class Claim:
    """One statement of a paper and the test that checks it here.

    Attributes:
      text: the claim, one short sentence.
      test: the pytest node that checks it, `tests/papers/test_<slug>.py::test_name`, or None.
      reached: whether that test reproduces the claim.
      note: what was measured, or why the claim is out of reach here.
    """

    text: str
    test: str | None = None
    reached: bool = False
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Paper:
    """The record of one paper, kept beside its technique.

    Attributes:
      slug: its name in `papers.tsv`, `configs/<slug>.py` and `tests/papers/test_<slug>.py`.
      status: `verified` (equations and claims tested), `equations` (equations tested, some claim
        out of reach here, its note says why) or `todo`.
      claims: what the paper claims.
      source: where the equations were read.
      departures: where this implementation differs from the paper, one sentence each.
    """

    slug: str
    status: str
    claims: tuple[Claim, ...] = ()
    source: str = ""
    departures: tuple[str, ...] = ()

    def __post_init__(self):
        if self.status not in STATUSES:
            raise UserError(
                f"paper {self.slug!r} has status {self.status!r}; {nearest(self.status, STATUSES)}"
            )


@dataclasses.dataclass(frozen=True)
class Entry:
    """A row of `papers.tsv` joined with its record, config and technique, where they exist."""

    slug: str
    title: str
    family: str
    paper: Paper
    technique: str | None = None  # import path of the module, such as efficient.mixers.pool
    config: str | None = None  # path from the root, such as configs/poolformer.py

    @property
    def status(self) -> str:
        return self.paper.status

    @property
    def checked(self) -> str:
        """How many claims a test reproduces, `3 of 4`; empty where none is recorded."""
        claims = self.paper.claims
        return f"{sum(claim.reached for claim in claims)} of {len(claims)}" if claims else ""


def load_rows() -> list[dict[str, str]]:
    """The rows of `papers.tsv`: slug, title, family."""
    with (pathlib.Path(__file__).parent / "papers.tsv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def technique_modules(package: types.ModuleType) -> Iterable[types.ModuleType]:
    """Imports every module in the slot packages under `package`, the training loop left out."""
    for info in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        if info.ispkg and not info.name.endswith(".training"):
            yield from _import_tree(info.name)


def _import_tree(name: str) -> Iterable[types.ModuleType]:
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"{name} cannot be imported: {error}") from error
    yield module
    for info in pkgutil.iter_modules(getattr(module, "__path__", ()), name + "."):
        if not info.name.endswith(".__main__"):
            yield from _import_tree(info.name)


def discover(package: types.ModuleType, slugs: Iterable[str]) -> dict[str, tuple[Paper, str]]:
    """The records under `package`: slug -> (record, import path of the module that holds it).

    Raises:
      UserError: a record's slug is not among `slugs`, or two records have the same slug.
    """
    slugs = set(slugs)
    found: dict[str, tuple[Paper, str]] = {}
    for module in technique_modules(package):
        single = vars(module).get("PAPER")
        for paper in (*vars(module).get("PAPERS", ()), *([] if single is None else [single])):
            if paper.slug not in slugs:
                hint = nearest(paper.slug, slugs)
                raise UserError(f"{module.__name__}: papers.tsv has no {paper.slug!r}; {hint}")
            other, where = found.get(paper.slug, (paper, ""))
            if other is not paper:
                raise UserError(
                    f"paper {paper.slug!r} has two records, in {where} and {module.__name__}; "
                    "keep one"
                )
            # A package comes before its modules: one that re-exports a record gives way to them.
            found[paper.slug] = (paper, module.__name__)
    return found


def entries(root: pathlib.Path = ROOT) -> list[Entry]:
    """Every paper of `papers.tsv`, in its order."""
    import efficient

    rows = load_rows()
    found = discover(efficient, (row["slug"] for row in rows))
    result = []
    for row in rows:
        paper, technique = found.get(row["slug"], (Paper(row["slug"], "todo"), None))
        config = f"configs/{row['slug']}.py"
        config = config if (root / config).is_file() else None
        result.append(Entry(**row, paper=paper, technique=technique, config=config))
    return result


def as_json(listed: Iterable[Entry]) -> str:
    """A list of {slug, title, status, config, technique, claims}."""
    fields = ("slug", "title", "status", "config", "technique")
    return json.dumps(
        [
            {name: getattr(entry, name) for name in fields}
            | {"claims": [dataclasses.asdict(claim) for claim in entry.paper.claims]}
            for entry in listed
        ],
        indent=2,
    )


def count_line(listed: Sequence[Entry]) -> str:
    """`15 of 155 papers: 12 verified, 3 equations.`"""
    counts = collections.Counter(entry.status for entry in listed)
    done = counts["verified"] + counts["equations"]
    return (
        f"{done} of {len(listed)} papers: {counts['verified']} verified, "
        f"{counts['equations']} equations."
    )


def markdown(listed: Sequence[Entry]) -> str:
    """The README's table: the papers that are not `todo`, under a line that counts them."""
    lines = [
        count_line(listed),
        "",
        "| Paper | What it replaces | Technique | Config | Status | Checked claims |",
        "|---|---|---|---|---|---|",
    ]
    for entry in listed:
        if entry.status == "todo":
            continue
        slot, *rest = entry.technique.split(".")[1:]
        cells = (
            entry.title.replace("|", "\\|"),
            REPLACES.get(slot, slot),
            f"[`{'/'.join([slot, *rest])}`]({_source(entry.technique)})",
            f"[`{entry.slug}`]({entry.config})" if entry.config else "",
            entry.status,
            f"[{entry.checked}](tests/papers/test_{entry.slug}.py)" if entry.checked else "",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _source(technique: str) -> str:
    """The file of a module, from the root, with forward slashes."""
    file = pathlib.Path(sys.modules[technique].__file__).resolve()
    return file.relative_to(ROOT).as_posix() if file.is_relative_to(ROOT) else file.name


def between_markers(text: str) -> str:
    """What lies between the two markers of README.md.

    Raises:
      UserError: there is not exactly one pair of markers.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise UserError(f"README.md needs {BEGIN} and {END} once each, where the table belongs")
    return text.partition(BEGIN)[2].partition(END)[0].strip("\n")


def write_readme(path: pathlib.Path, table: str) -> None:
    """Replaces what lies between the markers of `path` by `table`, atomically."""
    if not path.is_file():
        raise UserError(f"there is no {path.name} in the project's root to put the table into")
    text = path.read_text(encoding="utf-8")
    between_markers(text)
    head, tail = text.partition(BEGIN)[0], text.partition(END)[2]
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(f"{head}{BEGIN}\n\n{table}\n\n{END}{tail}", encoding="utf-8")
    os.replace(temporary, path)


def overview(listed: Sequence[Entry], total: Sequence[Entry]) -> str:
    """The listing for people: a line a paper, then the totals."""
    rows = [
        (
            entry.slug,
            entry.title if len(entry.title) <= 48 else entry.title[:47].rstrip() + "…",
            entry.family,
            entry.status,
            entry.checked,
            (entry.technique or "").removeprefix("efficient."),
            entry.config or "",
        )
        for entry in listed
    ]
    header = ("slug", "title", "family", "status", "claims", "technique", "config")
    return f"{text_table(header, rows)}\n\n{count_line(total)}"


def details(entry: Entry) -> str:
    """One paper: its claims with their tests, its source and departures."""
    lines = [entry.title, f"  family     {entry.family}", f"  status     {entry.status}"]
    lines += [f"  technique  {entry.technique or 'none'}", f"  config     {entry.config or 'none'}"]
    if entry.paper.source:
        lines.append(f"  source     {entry.paper.source}")
    for claim in entry.paper.claims:
        note = f" ({claim.note})" if claim.note else ""
        lines.append(f"  {'checked' if claim.reached else 'open':<9}  {claim.text}{note}")
        lines += [f"             {claim.test}"] if claim.test else []
    lines += [f"  departs    {departure}" for departure in entry.paper.departures]
    return "\n".join(lines)


@main_guard
def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m efficient.papers", description="The papers and how far each has come."
    )
    parser.add_argument("slug", nargs="?", help="show this paper with its claims")
    parser.add_argument("--status", choices=STATUSES, help="only papers of this status")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="a list of objects")
    output.add_argument("--markdown", action="store_true", help="the README's table")
    output.add_argument("--write-readme", action="store_true", help="put it into README.md")
    options = parser.parse_args(arguments)
    if (options.markdown or options.write_readme) and (options.status or options.slug):
        raise UserError("the README's table holds every paper begun; leave --status and slug out")
    total = entries()
    listed = [entry for entry in total if options.status in (None, entry.status)]
    if options.slug is not None:
        listed = [entry for entry in listed if entry.slug == options.slug]
        if not listed:
            hint = nearest(options.slug, (entry.slug for entry in total))
            raise UserError(f"no paper {options.slug!r} to show; {hint}")
    if options.json:
        print(as_json(listed))
    elif options.markdown:
        print(markdown(total))
    elif options.write_readme:
        write_readme(ROOT / "README.md", markdown(total))
    else:
        print(details(listed[0]) if options.slug else overview(listed, total))


if __name__ == "__main__":
    main()
