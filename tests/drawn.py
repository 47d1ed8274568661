"""What a figure shows, for tests: the data and the words of its artists, without rendering."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from matplotlib.collections import Collection
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.text import Text


def shown(figure: Figure) -> list[tuple[Any, ...]]:
    """Data of all lines, areas, collections and images, and all texts, in drawing order."""
    found: list[tuple[Any, ...]] = []
    for artist in figure.findobj():
        if isinstance(artist, Text):
            found.append(("text", artist.get_text()))
        elif isinstance(artist, Line2D):
            found.append(("line", _bytes(artist.get_xydata())))
        elif isinstance(artist, Patch):
            path = artist.get_patch_transform().transform_path(artist.get_path())
            found.append(("area", _bytes(path.vertices)))
        elif isinstance(artist, Collection):
            paths = [_bytes(path.vertices) for path in artist.get_paths()]
            array = artist.get_array()
            colours = () if array is None else _bytes(array)
            found.append(("collection", _bytes(artist.get_offsets()), *paths, colours))
        elif isinstance(artist, AxesImage):
            found.append(("image", _bytes(artist.get_array())))
    return found


def _bytes(array: Any) -> bytes:
    return np.ma.filled(np.ma.asarray(array, np.float64), np.nan).tobytes()


def leaves(values: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every number in a record, of the first and the last item of each list."""
    if isinstance(values, dict):
        for key, inner in values.items():
            yield from leaves(inner, (*path, key))
    elif isinstance(values, (list, tuple)):
        for index in sorted({0, len(values) - 1} if values else ()):
            yield from leaves(values[index], (*path, index))
    elif isinstance(values, (int, float)) and not isinstance(values, bool):
        yield path


def changed(values: Any, path: tuple[Any, ...]) -> Any:
    """A copy of a record in which one number is a little larger, an integer by one."""
    new = copy.deepcopy(values)
    inner = new
    for key in path[:-1]:
        inner = inner[key]
    old = inner[path[-1]]
    inner[path[-1]] = old + 1 if isinstance(old, int) else 1.02 * old or 0.001
    return new


def hidden(draw: Callable[[Any], Figure], values: Any) -> set[str]:
    """The kinds of numbers in a record that do not change its figure: their keys, joined by
    dots, without the indices of lists.
    """
    kinds: dict[str, list[tuple[Any, ...]]] = {}
    for path in leaves(values):
        kinds.setdefault(".".join(key for key in path if isinstance(key, str)), []).append(path)
    plain = shown(draw(values))

    def unchanged(path: tuple[Any, ...]) -> bool:
        try:
            return shown(draw(changed(values, path))) == plain
        except (ZeroDivisionError, StopIteration):  # rows that the figure needs are missing
            return False

    return {kind for kind, paths in kinds.items() if all(map(unchanged, reversed(paths)))}
