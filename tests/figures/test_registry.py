"""Pictures are a function of their data: same bytes each time, and stale ones are told
apart.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib
import pytest
from matplotlib.figure import SubFigure

from figure_examples import EXAMPLES
from refllm.experiments import gguf_layouts, gguf_mixes, kv_memory, kv_quantization, roofline
from refllm.figures import registry
from refllm.figures.registry import FIGURES, check, redraw, save
from refllm.measure import plotting
from refllm.measure.plotting import SERIES
from refllm.measure.records import Record, read, write
from refllm.simulate import timeline

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A folder with data for every registered figure, and the pictures, drawn once."""
    folder = tmp_path_factory.mktemp("figures")
    for name, (file, _) in FIGURES.items():
        write(folder / "data" / file, Record(f"make {name}", "A", "none", EXAMPLES[name]))
    assert [p.name for p in redraw(folder=folder)] == [f"{name}.png" for name in FIGURES]
    return folder


@pytest.fixture
def folder(original, tmp_path):
    """A copy to change."""
    return Path(shutil.copytree(original, tmp_path / "figures"))


def digests(paths):
    return [hashlib.sha256(Path(p).read_bytes()).hexdigest() for p in paths]


def test_same_data_gives_the_same_bytes(original, folder):
    paths = sorted(original.glob("*.png"))
    assert digests(redraw(folder=folder)) == digests(original / f"{name}.png" for name in FIGURES)
    assert len(set(digests(paths))) == len(FIGURES)


def test_bytes_do_not_depend_on_the_reader_s_own_style(original, folder):
    with matplotlib.rc_context(
        {"font.size": 20, "axes.grid": False, "savefig.dpi": 30, "lines.linewidth": 9}
    ):
        mine = dict(matplotlib.rcParams)
        assert digests(redraw(["kv_memory"], folder)) == digests([original / "kv_memory.png"])
        assert dict(matplotlib.rcParams) == mine  # and that style is left as it was


def test_no_date_and_no_version_is_written(original):
    for path in original.glob("*.png"):
        raw = path.read_bytes()
        assert b"matplotlib" not in raw
        assert raw.count(b"tEXt") == 1  # the digest alone


def test_check_is_silent_after_a_redraw_and_names_what_changed(folder):
    assert check(folder) == []
    changed = json.loads((folder / "data" / "kv_memory.json").read_text())
    changed["values"]["lines"]["a"][1] = 2e10
    (folder / "data" / "kv_memory.json").write_text(json.dumps(changed))
    (complaint,) = check(folder)
    assert "kv_memory.png is stale" in complaint
    (folder / "data" / "roofline.json").unlink()
    (folder / "decode_cost.png").unlink()
    complaints = check(folder)
    assert any("roofline has no data" in c for c in complaints)
    assert any("decode_cost.png is missing" in c for c in complaints)
    assert len(complaints) == 3


def test_check_sees_a_change_of_the_code_and_of_the_style(folder, monkeypatch):
    def other(values):
        return kv_memory.draw(values)

    monkeypatch.setitem(FIGURES, "kv_memory", ("kv_memory.json", other))
    assert len(check(folder)) == 1
    monkeypatch.setattr(registry, "STYLE", registry.STYLE | {"font.size": 11})
    assert len(check(folder)) == len(FIGURES)


def stale_after(folder, monkeypatch, module, old, new):
    """The figures that are stale once ``old`` is replaced in the source of ``module``."""
    source = inspect.getsource
    assert old in source(module)
    with monkeypatch.context() as patch:
        patch.setattr(
            inspect,
            "getsource",
            lambda part: source(part).replace(old, new) if part is module else source(part),
        )
        return {Path(complaint.split()[0]).stem for complaint in check(folder)}


@pytest.mark.parametrize(
    ("module", "old", "new", "stale"),
    [
        # a helper of the drawing function, a constant that it uses, a constant from elsewhere
        (kv_quantization, "bytes, share of", "share of", {"kv_quantization"}),
        (kv_quantization, '"KIVI": TECHNIQUE', '"KIVI": NEAREST', {"kv_quantization"}),
        (timeline, "SHARED = -2", "SHARED = -4", {"serving_blocks"}),
        # what all figures share
        (plotting, '"lines.linewidth": 2,', '"lines.linewidth": 3,', set(FIGURES)),
        (registry, "fontsize=6.5", "fontsize=7", set(FIGURES)),
        # what measures decides the data, not the picture
        (kv_quantization, "stride=length", "stride=1", set()),
    ],
)
def test_a_figure_is_stale_where_code_that_it_is_drawn_by_changed(
    folder, monkeypatch, module, old, new, stale
):
    """Not the drawing function alone decides what a picture looks like, nor its whole
    module.
    """
    assert stale_after(folder, monkeypatch, module, old, new) == stale


def test_a_picture_without_data_is_named(folder):
    (folder / "drawn_by_hand.png").write_bytes(b"")
    (complaint,) = check(folder)
    assert "drawn_by_hand.png is drawn from no data" in complaint


def test_redraw_draws_what_has_data_and_rejects_what_is_asked_for_without(folder):
    for file in {FIGURES[name][0] for name in FIGURES} - {"kv_memory.json"}:
        (folder / "data" / file).unlink()
    assert [p.name for p in redraw(folder=folder)] == ["kv_memory.png"]
    with pytest.raises(FileNotFoundError):
        redraw(["roofline"], folder)
    with pytest.raises(KeyError):
        redraw(["no such figure"], folder)


def test_data_of_another_shape_is_rejected_by_file_and_the_old_picture_stays(folder):
    redraw(["kv_memory"], folder)
    before = (folder / "kv_memory.png").read_bytes()
    path = folder / "data" / "kv_memory.json"
    path.write_text(
        '{"command": "x", "kind": "A", "hardware": "none", "values": {"contexts": [1]}}'
    )
    with pytest.raises(
        ValueError, match=r"kv_memory\.json holds other values than kv_memory is drawn from.*lines"
    ):
        redraw(folder=folder)
    assert (folder / "kv_memory.png").read_bytes() == before


def test_no_series_is_left_out_for_want_of_a_colour():
    draw = FIGURES["kv_memory"][1]
    lines = {str(i): [1.0, 2.0] for i in range(len(SERIES) + 1)}
    with pytest.raises(ValueError, match="tells 7 series apart, got 8"):
        draw({"contexts": [1, 2], "lines": lines})
    lines.popitem()
    assert len(draw({"contexts": [1, 2], "lines": lines}).axes[0].lines) == 7


def test_one_name_is_one_figure(folder):
    assert [p.name for p in redraw("kv_memory", folder)] == ["kv_memory.png"]


# a quantity's label names its unit, as a word of its own; these are what figures count and
# measure in
_COUNTED = (
    "tokens bits bytes byte slots requests sequences step block channels times share elements "
    "products"
)
UNITS = {*_COUNTED.split(), "ms", "seconds", "second", "nats", "FLOP", "%"}
# and these have none
PURE = (
    "α",
    "|x|",
    "density of |x|",
    "error ‖x̂ − x‖² / ‖x‖²",
    "relative error (rms)",
    "speedup by the formula",
)


def quantities(ax):
    """The labels of those axes of a plot that have values at their ticks; of shared ones,
    where they are written.
    """
    for axis, near, label in (
        (ax.xaxis, ax.get_shared_x_axes(), "get_xlabel"),
        (ax.yaxis, ax.get_shared_y_axes(), "get_ylabel"),
    ):
        texts = [
            tick.label1.get_text() for tick in axis.get_major_ticks() if tick.label1.get_visible()
        ]
        numbers = [text for text in texts if re.fullmatch(r"[\d.,\u2212×k%]+|\$.*\$", text)]
        if axis.get_visible() and numbers and len(numbers) == len([text for text in texts if text]):
            own = max((getattr(other, label)() for other in near.get_siblings(ax)), key=len)
            # a row of plots may share one label, which is then its subfigure's
            part = ax.get_figure()
            yield own or (
                getattr(part, f"get_sup{label[4:]}")() if isinstance(part, SubFigure) else ""
            )


@pytest.mark.parametrize("name", FIGURES)
def test_every_quantity_has_its_unit_every_plot_its_title_and_the_caption_the_command(
    name, folder, monkeypatch
):
    drawn = {}
    monkeypatch.setattr(
        registry, "save", lambda figure, path, digest="": drawn.setdefault(Path(path).stem, figure)
    )
    redraw([name], folder)
    drawn[name].draw_without_rendering()  # which writes the tick labels
    every = [ax for ax in drawn[name].axes if ax.axison]
    for ax in every:
        for label in quantities(ax):
            words = re.findall(r"%|\w+", label)
            plain = label.removesuffix(" (log)").replace(", log)", ")")
            assert plain in PURE or set(words) & set(UNITS), (
                ax.get_title(loc="left"),
                label,
            )
        # stacked plots over one axis share a title, too
        shared = [*ax.get_shared_x_axes().get_siblings(ax)]
        assert any(other.get_title(loc="left") for other in shared), (
            f"a plot without a title: {ax.get_ylabel()}"
        )
    assert any(label for ax in every for label in quantities(ax)), "no quantity at all"
    assert read(folder / "data" / FIGURES[name][0]).command in drawn[name].get_supxlabel()


def test_size_is_that_of_a_page(original):
    for path in original.glob("*.png"):
        raw = path.read_bytes()
        # the PNG's IHDR chunk
        width, height = (int.from_bytes(raw[i : i + 4], "big") for i in (16, 20))
        assert width == 1152
        assert 300 < height < 1000
        assert len(raw) < 200_000


def test_colours_are_distinct_in_grey_too():
    """The three concepts differ in lightness, for readers who see no colour."""
    light = [
        sum(w * int(c[i : i + 2], 16) for w, i in ((0.30, 1), (0.59, 3), (0.11, 5)))
        for c in SERIES[:2]
    ]
    assert abs(light[0] - light[1]) > 40
    assert len(set(SERIES)) == len(SERIES)


def test_save_takes_any_figure(tmp_path):
    fig, ax = plotting.axes("title", "x (s)", "y (s)")
    ax.plot([0, 1], [0, 1])
    assert save(fig, tmp_path / "deep" / "a.png").read_bytes().count(b"tEXt") == 0


def test_pyplot_is_never_imported():
    code = "import refllm.figures as f, sys; "
    code += "f.FIGURES['kv_memory'][1]({'contexts': [1], 'lines': {}}); "
    code += "assert 'matplotlib.pyplot' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_data_of_the_counted_and_projected_figures_is_up_to_date(tmp_path):
    """The committed values are those that the command in the file makes now."""
    for experiment in (kv_memory, roofline, gguf_layouts, gguf_mixes):
        experiment.main(str(tmp_path))
    assert len(list(tmp_path.glob("*.json"))) == 6
    for path in tmp_path.glob("*.json"):
        assert path.read_text() == (ROOT / "figures" / "data" / path.name).read_text(), path.name


def test_committed_pictures_are_not_stale():
    assert [c for c in check(ROOT / "figures") if "stale" in c] == []
