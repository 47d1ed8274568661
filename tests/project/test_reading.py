"""READING.md is current, and each core file stands in a notebook's last table."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import reading


def test_the_page_is_current():
    stale = "READING.md is stale: run `make reading` and commit it"
    assert reading.PAGE.read_text(encoding="utf-8") == reading.page(), stale


def test_each_core_file_has_a_row_and_each_row_names_what_exists():
    assert reading.problems() == []


@pytest.mark.parametrize("path", reading.NOTEBOOKS, ids=lambda path: path.stem)
def test_the_links_of_a_notebook_point_at_files_that_exist(path: Path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    text = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    targets = re.findall(r"\]\(([^)\s#]+)[^)]*\)", re.sub(r"\$[^$]*\$", "", text))
    missing = [t for t in targets if "://" not in t and not (path.parent / t).exists()]
    assert not missing


def test_each_notebook_says_what_you_will_do_learn_and_need():
    for path in reading.NOTEBOOKS:
        opening = "".join(json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"])
        for promise in ("**What you'll do.**", "**What you'll learn.**", "**What you'll need.**"):
            assert promise in opening, f"{path.name} lacks {promise}"
