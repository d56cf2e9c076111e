"""``make deps``: write down of what code each stage is made, for DVC to compare.

``pipelines/code/<stage>.txt`` lists every file of the project that is run or read when a stage runs, with a
digest of its text. Comments, docstrings and blank lines do not count, so that a sentence put right does not
train every network again. DVC sees a change of the code when this command has been run: ``make demo`` runs
it, and a test fails where it was forgotten.
"""

from __future__ import annotations

import ast
import hashlib
import io
import sys
import tokenize
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HERE = Path(__file__).resolve().parent
OURS = ("pipelines", "qkt_clinical")


def code_text(source: str) -> str:
    """A Python file without comments, docstrings, blank lines and spaces at the ends of lines."""
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(ast.parse(source)):
        if (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            lines[node.lineno - 1 : node.end_lineno] = [""] * (
                (node.end_lineno or node.lineno) - node.lineno + 1
            )
    return "\n".join(line.rstrip() for line in lines if line.strip())


def digest(file: Path) -> str:
    """The first 16 hexadecimal digits of SHA-256, over the code of a Python file, all bytes of another."""
    content = file.read_bytes()
    if file.suffix == ".py":
        content = code_text(content.decode("utf-8")).encode()
    return hashlib.sha256(content).hexdigest()[:16]


def files_of(module: str) -> list[Path]:
    """The files that are run when a dotted name is imported: every package's ``__init__`` on the way."""
    found, parts = [], module.split(".")
    for end in range(1, len(parts) + 1):
        place = ROOT.joinpath(*parts[:end])
        found += [f for f in (place.with_suffix(".py"), place / "__init__.py") if f.is_file()]
    return found


@cache
def imports(file: Path) -> frozenset[str]:
    """Every module of the project that a file names, wherever in it the import stands.

    Raises:
        ValueError: a relative import, which is not followed.
    """
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            if node.level:
                raise ValueError(f"{file}: relative imports are not followed")
            names |= {str(node.module), *(f"{node.module}.{a.name}" for a in node.names)}
        elif isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
    return frozenset(n for n in names if n.split(".")[0] in OURS)


def entry(stage: str) -> Path:
    """A stage's module in ``pipelines/``."""
    return HERE / f"{stage}.py"


def closure(start: Path) -> set[Path]:
    """All Python files of the project that are run when one is."""
    seen: set[Path] = set()
    waiting = [start]
    while waiting:
        file = waiting.pop()
        if file not in seen:
            seen.add(file)
            waiting += [f for module in imports(file) for f in files_of(module)]
    return seen


def data_of(file: Path) -> set[Path]:
    """Files that a package carries beside its modules: templates, tables, presets."""
    if file.name != "__init__.py":
        return set()
    beside = {f for f in file.parent.iterdir() if f.is_file()}
    below = {
        f
        for d in file.parent.iterdir()
        if d.is_dir() and not (d / "__init__.py").exists()
        for f in d.rglob("*")
    }
    return {f for f in beside | below if f.is_file() and f.suffix not in (".py", ".pyc", ".typed")}


def code_list(stage: str) -> str:
    """``pipelines/code/<stage>.txt``: one line per file, its digest and its path."""
    run = closure(entry(stage)) | {HERE / "__init__.py"}
    files = run | {d for f in run if HERE not in f.parents for d in data_of(f)}
    rows = sorted((f.relative_to(ROOT).as_posix(), digest(f)) for f in files)
    return "".join(f"{value} {name}\n" for name, value in rows)


def write_all() -> list[str]:
    """Bring every list up to date; the stages whose code has changed."""
    from qkt_clinical.catalog import STAGES

    changed = []
    folder = HERE / "code"
    folder.mkdir(exist_ok=True)
    for stage in STAGES:
        file, text = folder / f"{stage}.txt", code_list(stage)
        if not file.is_file() or file.read_text(encoding="utf-8") != text:
            file.write_text(text, encoding="utf-8")
            changed.append(stage)
    return changed


if __name__ == "__main__":
    stages = write_all()
    if stages:
        print(f"code has changed of: {', '.join(stages)}", file=sys.stderr)
