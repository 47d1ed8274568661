"""The numbers of README.md, made of the committed records:
``python tests/readme.py [--write | --check]``.

README.md marks what is generated: between ``<!-- begin: NAME -->`` and ``<!-- end -->``
stands what the function NAME of tests/readme_blocks.py returns, a table or whole paragraphs.
To change a number, measure again; to change a sentence with numbers, edit the function.

Everywhere else a number needs a reason, one of ``PHRASES``. Fenced code is left to
tests/project/test_readme.py, which executes it.

Nothing of the package is imported, so the script needs no installed package.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from readme_blocks import BLOCKS

PAGE = Path(__file__).resolve().parent.parent / "README.md"
BLOCK = re.compile(r"<!-- begin: ([\w-]+) -->\n(.*?)<!-- end -->", re.S)
# a number that stands alone: FP8, W4A16, H2O and NumPy's float32 are words
NUMBER = re.compile(r"(?<![\w.,/·-])\d[\d.,]*(?:·10⁻?[⁰¹²³⁴-⁹]+)?(?!\w)")

# Numbers that no record holds, with the words around them: versions, names, bounds of tests.
PHRASES = (
    "Python ≥ 3.11",
    "NumPy 2 and CuPy 14",
    "within 2·10⁻⁵ of the largest logit",  # tests/model/test_transformers.py
    "(8-bit activations)",
    "4 and 8 bits",  # what vLLM's documentation lists
    "13 and 15 are kept",
    "its part of the 24×",
    "the 1 % of channels",
)


def written(text: str) -> str:
    """``text`` with every block filled; ValueError for a block that no function makes, or
    for a function whose block is missing.
    """
    names = [match[1] for match in BLOCK.finditer(text)]
    if sorted(names) != sorted(BLOCKS):
        raise ValueError(f"README.md has the blocks {sorted(names)}, not {sorted(BLOCKS)}")

    def filled(match: re.Match[str]) -> str:
        return f"<!-- begin: {match[1]} -->\n{BLOCKS[match[1]]()}\n<!-- end -->"

    return BLOCK.sub(filled, text)


def prose(text: str) -> str:
    """What stands outside of generated blocks, fenced code, code in lines, link targets and
    the numbers of notebooks.
    """
    for hidden in (
        BLOCK.pattern,
        r"```.*?```",
        r"`[^`]*`",
        r"\[\d\d\]\(notebooks/[^)]*\)",
        r"\]\([^)]*\)",
    ):
        text = re.sub(hidden, " ", text, flags=re.S)
    return " ".join(text.split())


def problems(text: str) -> list[str]:
    """Numbers without a record, and phrases that the page no longer has."""
    rest = prose(text)
    found = []
    for phrase in PHRASES:
        if phrase not in rest:
            found.append(f"README.md no longer says {phrase!r}: remove it from PHRASES")
        rest = rest.replace(phrase, " ")
    for match in NUMBER.finditer(rest):
        around = rest[max(0, match.start() - 40) : match.end() + 40]
        found.append(f"a number without a record, {match[0]}, in README.md: … {around} …")
    return found


def main() -> int:
    """Print, write or check README.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write README.md")
    parser.add_argument("--check", action="store_true", help="fail if README.md is stale")
    options = parser.parse_args()
    page = PAGE.read_text(encoding="utf-8")
    text = written(page)
    found = problems(text)
    if options.write:
        PAGE.write_text(text, encoding="utf-8")
    elif options.check:
        if page != text:
            found.append("README.md is stale: run `make readme` and commit it")
    else:
        print(text, end="")
    for problem in found:
        print(problem, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
