"""Measure how readable a package is: ``python -m tests.style [PATH ...]``, by default
``refllm``.

- A function runs from ``def`` to its last line, docstring included and decorators excluded.
- Line lengths are those of the lines that are not blank. Rates are relative to all lines.
- Dunder methods and functions inside functions are not asked for a docstring.
- "Two on a line" is ``a, b = 1, 2``, ``a = b = 1`` and ``;``, relative to all assignments.
  A swap, ``a, b = b, a + b`` and the unpacking of a call or a name do not count.
- Words are searched in code (from Python 3.12 on in f-strings, too), comments and
  docstrings.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import re
import statistics
import tokenize
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

# Words to replace: pattern (no letter may stand beside it; a space is also a line break),
# where it counts ("code": names in docstrings too, and case matters), term. Zipf's and
# power laws may stay.
WORDS = [
    ("somebody|nobody|whoever|anew|lest|in vain", "prose", "plain English: who does what"),
    ("whole numbers?", "prose", "integer"),
    ("as (it|they) came|what waits", "prose", "full-precision residual window"),
    (r"the article|specs? §|\(design, §|(?-i:kind [A-D])", "prose", "(explain or leave out)"),
    ("the books|books (do not )?balance", "prose", "invariants hold"),
    ("same first choice", "prose", "top-1 agreement"),
    ("(bits|bytes|tokens|ms|FLOP) an? (weight|number|value|token|step|second)", "prose", "per"),
    ("hears?|heard|listen(s|ers?)?|said", "both", "consume · callback · output"),
    ("withdr[ae]w[ns]?|start(s|ed|ing)? over", "both", "roll back · preempt and recompute"),
    ("voices?", "both", "SequenceState"),
    ("seats?", "both", "SamplingInput · sequence slots"),
    ("ghosts?", "both", "padding row"),
    ("ledgers?", "both", "BaseScheduler"),
    (r"(?<!ipf's\s|tle's\s|ahl's\s|power\s|aling\s)laws?", "both", "acceptance rule, distribution"),
    (r"warp(?=\()|import .*warp|warped|warping|(every|all) warps?", "both", "logits processors"),
    ("(preallocated|own|longest|for|cache's) strips?|strips of", "both", "per-sequence KV buffer"),
    ("lean|LeanStep", "both", "single-token step"),
    ("plant(s|ed|ing)?", "both", "outlier injection"),
    ("peers?", "both", "reference implementation"),
    ("refus(e|es|ed|ing|als?)", "both", "reject · validate"),
    ("how|[Kk]nobs", "code", "SamplingParams · validated params"),
    ("steps_as_blocks|(key|value)_steps", "code", "expand_scale · scales"),
    ("Branch|branch", "code", "Sequence"),
    ("Live", "code", "RequestState"),
    ("Continuation", "code", "SampledTokens"),
    (r"(?<!\.)(Event|Piece|Output)", "code", "SequenceUpdate · StreamChunk · CompletionOutput"),
    (r"(?<!\.)tell", "code", "report"),
    ("Room", "code", "weight arena"),
    (r"text: (Sequence|list|tuple)\[int", "code", "token ids"),
    ("Stored|Storing|stored_as", "code", "WeightLayout · ExportSpec · layout_for"),
    ("Scaled|Reordered|Solution", "code", "BlockFloatLinear · act-order (g_idx) · GPTQResult"),
]
AIMS = {
    "functions with a docstring, %": ">= 80",
    "line length, p90": "<= 92",
    "lines over 100 columns": "<= 0",
    "two on a line, % of assignments": "<= 2",
    "conditional expressions per 1,000": "<= 10",
    "fmt: skip and fmt: off": "<= 40",
    "Any": "<= 149",
    "words to replace": "<= 0",
}
DOCUMENTED = ("functions", "public functions", "classes")
WORST = ("over 100", "two", "conditional", "fmt", "Any", "undocumented", "words")
SHAPE = re.compile(r"\[(?=[^]]*[A-Z])[^][,\s]+(, ?[^][,\s]+)+\]|(?<!\w)\[[A-Z]\]")  # [T, H, D]
NAMED = re.compile(r"``[^`]+``|^[ \t]*\| *\w+(, *\w+)* *\|", re.MULTILINE)  # names in prose
KINDS = {"COMMENT": "comment", "STRING": "string", "FSTRING_MIDDLE": "string"}  # else code
Function = ast.FunctionDef | ast.AsyncFunctionDef


def compiled(pattern: str, where: str) -> re.Pattern[str]:
    """A pattern of ``WORDS``; where a space is a line break, the next line may begin with
    #.
    """
    spaced = pattern.replace(" ", r"[ #]*[ \n][ #]*")
    flags = re.NOFLAG if where == "code" else re.IGNORECASE
    return re.compile(rf"(?<![A-Za-z])(?:{spaced})(?![A-Za-z])", flags)


class File(NamedTuple):
    """What was found in one file."""

    path: str
    room: str  # first folder below the package, or "." for the files beside the folders
    widths: list[int]  # of the lines that are not blank
    functions: list[int]  # lines of each function
    counts: Counter[str]
    words: list[tuple[int, str, str]]  # line, what stands there, standard term


def layers(text: str, tree: ast.Module) -> dict[str, str]:
    """Split a file into code, comments, docstrings and other strings, each at its old
    place.
    """
    alone = [n.value for n in ast.walk(tree) if isinstance(n, ast.Expr)]
    docstrings = {(n.lineno, n.col_offset): "doc" for n in alone if isinstance(n, ast.Constant)}
    rows = {name: [""] * (text.count("\n") + 2) for name in ("code", "comment", "doc", "string")}
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        kind = KINDS.get(tokenize.tok_name[token.type], "code")
        name = docstrings.get(token.start, kind)
        for i, piece in enumerate(token.string.split("\n")):
            row = token.start[0] - 1 + i
            column = token.start[1] if i == 0 else 0
            rows[name][row] = rows[name][row].ljust(column) + piece
    return {name: "\n".join(lines) for name, lines in rows.items()}


def find_words(text: str, name: str) -> Iterator[tuple[int, str, str]]:
    """(line, what stands there, standard term) of the words to replace in one layer of a
    file.
    """
    whole = [(0, len(text))]
    spans = {"both": whole, "prose": whole, "code": [m.span() for m in NAMED.finditer(text)]}
    if name == "code":
        spans = {"both": whole, "prose": [], "code": whole}
    for word, where, term in WORDS:
        pattern = compiled(word, where)
        for match in (match for span in spans[where] for match in pattern.finditer(text, *span)):
            line = text.count("\n", 0, match.start()) + 1
            yield line, re.sub(r"[\s#]+", " ", match[0]), term


def sets_two(node: ast.Assign) -> bool:
    """Whether an assignment sets several things that could stand on lines of their own."""
    sides = [s for s in (node.targets[0], node.value) if isinstance(s, ast.Tuple | ast.List)]
    if len(node.targets) > 1 or len(sides) < 2:
        return len(node.targets) > 1
    names = {ast.unparse(element) for element in sides[0].elts}
    mentioned = {ast.unparse(part) for part in ast.walk(node.value) if isinstance(part, ast.expr)}
    # a swap, too, mentions what it sets
    return 2 <= len(sides[0].elts) == len(sides[1].elts) and not names & mentioned


def count(tree: ast.Module, layer: dict[str, str], functions: Sequence[Function]) -> Counter[str]:
    """What is counted by syntax or by comment."""
    found = Counter[str]()
    for node in ast.walk(tree):
        found["assignments"] += isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign)
        found["two"] += isinstance(node, ast.Assign) and sets_two(node)
        found["conditional"] += isinstance(node, ast.IfExp)
        found["imported Any"] += isinstance(node, ast.alias) and node.name == "Any"
        found["Any"] += "Any" in (getattr(node, "id", ""), getattr(node, "attr", ""))
        for annotation in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            quoted = re.findall("'[^']*'", ast.unparse(annotation) if annotation else "")
            found["Any"] += len(re.findall(r"\bAny\b", " ".join(quoted)))
    found["two"] += len(re.findall(r";[ \t]*\S", layer["code"]))
    comments = [line for line in layer["comment"].split("\n") if line]
    found["comments"] = len(comments)
    found["shapes"] = sum(SHAPE.search(line) is not None for line in comments)
    found["fmt"] = len(re.findall(r"# *fmt: *(?:skip|off)\b", layer["comment"]))
    inside = {n for f in functions for n in ast.walk(f) if isinstance(n, Function) and n is not f}
    asked = [f for f in functions if f not in inside and not re.fullmatch("__.*__", f.name)]
    public = [f for f in asked if not f.name.startswith("_")]
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    for name, nodes in zip(DOCUMENTED, (asked, public, classes), strict=True):
        found[name] = len(nodes)
        found[f"bare {name}"] = sum(ast.get_docstring(node) is None for node in nodes)
    found["undocumented"] = found["bare functions"]
    return found


def read_file(path: Path, root: Path) -> File:
    """Read and count one file; SyntaxError if it is not Python."""
    text = path.read_text("utf-8-sig")
    tree = ast.parse(text, str(path))
    layer = layers(text, tree)
    functions = [node for node in ast.walk(tree) if isinstance(node, Function)]
    spans = [(f.end_lineno or 0) - f.lineno + 1 for f in functions]
    widths = [len(line) for line in text.split("\n") if line.strip()]
    words = sorted(word for n in ("code", "comment", "doc") for word in find_words(layer[n], n))
    counts = count(tree, layer, functions)
    counts["lines"] = len(text.splitlines())
    counts["longest"] = max(spans, default=0)
    counts["over 100"] = sum(width > 100 for width in widths)
    counts["words"] = len(words)
    room = path.relative_to(root).parent.as_posix().split("/")[0]
    return File(str(path), room, widths, spans, counts, words)


def read(root: Path) -> list[File]:
    """All files below a folder, hidden folders apart."""
    paths = sorted(root.rglob("*.py"))
    files = [read_file(p, root) for p in paths if "/." not in f"/{p.relative_to(root).as_posix()}"]
    if not any(file.widths for file in files):
        raise SystemExit(f"{root}: no Python code")
    return files


def measure(files: Sequence[File]) -> dict[str, float]:
    """The quantities of the table, in its order."""
    sums = sum((file.counts for file in files), Counter[str]())
    spans = sorted(span for file in files for span in file.functions) or [0]
    widths = sorted(width for file in files for width in file.widths)
    rooms = Counter(file.room for file in files)
    part = {name: 100 - 100 * sums[f"bare {name}"] / (sums[name] or 1) for name in DOCUMENTED}
    return {
        "files": len(files),
        "lines": sums["lines"],
        "files over 300 lines": sum(file.counts["lines"] > 300 for file in files),
        "functions": sum(len(file.functions) for file in files),
        "function lines, median": statistics.median(spans),
        "function lines, p90": spans[9 * len(spans) // 10],
        "function lines, longest": spans[-1],
        "functions over 50 lines": sum(span > 50 for span in spans),
        **{f"{name} with a docstring, %": share for name, share in part.items()},
        "comments per 100 lines": 100 * sums["comments"] / sums["lines"],
        "shape comments per 100 lines": 100 * sums["shapes"] / sums["lines"],
        "line length, p90": widths[9 * len(widths) // 10],
        "line length, longest": widths[-1],
        "lines over 100 columns": sums["over 100"],
        "two on a line, % of assignments": 100 * sums["two"] / (sums["assignments"] or 1),
        "conditional expressions per 1,000": 1000 * sums["conditional"] / sums["lines"],
        "fmt: skip and fmt: off": sums["fmt"],
        "Any": sums["Any"],
        "Any, imports included": sums["Any"] + sums["imported Any"],
        "words to replace": sums["words"],
        **{f"files in {room}": number for room, number in sorted(rooms.items())},
    }


def missed(name: str, value: float) -> bool:
    """Whether a quantity has an aim and does not reach it."""
    sign, bound = AIMS.get(name, ">= -inf").split()
    return value < float(bound) if sign == ">=" else value > float(bound)


def table(columns: dict[str, dict[str, float]]) -> Iterator[str]:
    """Lines of the table of quantities; an exclamation mark follows what misses its aim."""
    heads = {path: f"{path:>9}" for path in columns}
    yield f"{'':34}{'aim':>6}" + "".join(f"  {head} " for head in heads.values())
    for name in dict.fromkeys(name for values in columns.values() for name in values):
        line = f"{name:34}{AIMS.get(name, ''):>6}"
        for path, values in columns.items():
            line += f"  {round(values.get(name, 0), 1):{len(heads[path])},}"
            line += "!" if missed(name, values.get(name, 0)) else " "
        yield line.rstrip()


def file_rows(files: Sequence[File], most: int) -> Iterator[str]:
    """The files that hold the largest shares of what is counted in ``WORST``."""
    sums = sum((file.counts for file in files), Counter[str]())
    shares = {f.path: sum(f.counts[n] / max(1, sums[n]) for n in WORST) for f in files}
    names = ("lines", "longest", *WORST)
    yield "".join(f"{name:>13}" for name in names) + "  file"
    for file in sorted(files, key=lambda file: -shares[file.path])[:most]:
        yield "".join(f"{file.counts[name]:13}" for name in names) + f"  {file.path}"


def main() -> int:
    """Print what the options ask for; 1 if ``--check`` finds a missed aim."""
    parser = argparse.ArgumentParser(prog="python -m tests.style")
    parser.add_argument("paths", nargs="*", type=Path, default=[Path("refllm")])
    parser.add_argument("--files", nargs="?", type=int, const=20, help="the worst files, 20 or N")
    parser.add_argument("--words", action="store_true", help="where each word to replace stands")
    parser.add_argument("--json", action="store_true", help="everything as JSON")
    parser.add_argument("--check", action="store_true", help="only missed aims; exit 1 if any")
    chosen = parser.parse_args()
    packages = {str(path): read(path) for path in chosen.paths}
    columns = {path: measure(files) for path, files in packages.items()}
    misses = [
        f"{path}: {name}: {value:.4g}, aim {AIMS[name]}"
        for path, values in columns.items()
        for name, value in values.items()
        if missed(name, value)
    ]
    lines = misses if chosen.check else list(table(columns))
    facts = {}
    for path, files in packages.items():
        facts[path] = {"measures": columns[path], "files": [file._asdict() for file in files]}
        if chosen.files:
            lines += file_rows(files, chosen.files)
        for file in files if chosen.words else []:
            lines += [f"{file.path}:{line}: {word} -> {term}" for line, word, term in file.words]
    print(json.dumps(facts, indent=1) if chosen.json else "\n".join(lines))
    return int(chosen.check and bool(misses))


if __name__ == "__main__":
    raise SystemExit(main())
