"""Rows from the interpreter's own standard library: signature and docstring of a function → its body."""

import ast
import os
import textwrap
import tokenize
import warnings
from collections.abc import Iterator
from pathlib import Path

from fedmoe.demo.corpus_rows import Row

# Not the library itself, but in its directory: installed packages, tests, character tables, whole programs.
SKIPPED_DIRS = frozenset(
    {
        *("site-packages", "dist-packages", "ensurepip", "_vendor", "__pycache__", "__phello__"),
        *("test", "tests", "idle_test", "encodings", "pydoc_data", "idlelib", "turtledemo", "lib2to3"),
    }
)
MAX_FILE_BYTES = 60_000  # the largest files cost most of the time and give few short functions
MAX_SIGNATURE_CHARS = 120
MIN_DOC_CHARS, MAX_DOC_CHARS = 20, 240
MIN_BODY_CHARS, MAX_BODY_CHARS = 60, 300

Function = ast.FunctionDef | ast.AsyncFunctionDef


def python_rows(stdlib: Path) -> Iterator[Row]:
    """Yield a row for each usable function below `stdlib`, file by file in the order of their names."""
    for path in _files(stdlib):
        try:
            with tokenize.open(path) as file:  # honours the file's coding line
                text = file.read()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # some old files have invalid escapes
                tree = ast.parse(text)
        except (OSError, SyntaxError, ValueError, RecursionError):
            continue  # a file that cannot be parsed must not stop the others
        source = path.relative_to(stdlib).as_posix()
        lines = text.splitlines()
        for owner, function in _functions(tree):
            row = _row(source, owner, function, lines)
            if row:
                yield row


def _files(root: Path) -> Iterator[Path]:
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if name not in SKIPPED_DIRS)
        for name in sorted(names):
            path = Path(folder, name)
            if path.suffix == ".py" and path.is_file() and path.stat().st_size <= MAX_FILE_BYTES:
                yield path


def _functions(tree: ast.Module) -> Iterator[tuple[str, Function]]:
    """Yield (class name or "", function) for the module's functions and its classes' methods."""
    for node in tree.body:
        if isinstance(node, Function):
            yield "", node
        elif isinstance(node, ast.ClassDef):
            for member in node.body:
                if isinstance(member, Function):
                    yield node.name, member


def _row(source: str, owner: str, function: Function, lines: list[str]) -> Row | None:
    """Return the row of one function, or None if it is too short, too long or too odd to learn from."""
    doc = (ast.get_docstring(function) or "").split("\n\n")[0]
    if (
        not MIN_DOC_CHARS <= len(doc) <= MAX_DOC_CHARS
        or '"""' in doc
        or "\\" in doc
        or len(function.body) < 2
    ):
        return None
    docstring = function.body[0]
    signature = _dedented(lines[function.lineno - 1 : docstring.lineno - 1])
    body = _dedented(lines[docstring.end_lineno : function.end_lineno])
    if not signature.endswith(":") or len(signature) > MAX_SIGNATURE_CHARS:
        return None
    if not MIN_BODY_CHARS <= len(body) <= MAX_BODY_CHARS or "\n" not in body:
        return None
    kind = f"method of class {owner} in" if owner else "function of"
    module = source.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    opening = f"{signature}\n{textwrap.indent(_quoted(doc), ' ' * 4)}"
    return Row(
        prompt=f"Write the body of this {kind} Python's module {module}.\n\n{opening}",
        completion=body,
        source=source,
    )


def _dedented(lines: list[str]) -> str:
    return textwrap.dedent("\n".join(lines)).strip("\n")


def _quoted(doc: str) -> str:
    return f'"""{doc}"""'
