"""The code that decides a picture is followed through names, and stops where names are a
function's own.
"""

from __future__ import annotations

from refllm.experiments import kv_quantization, quantization_quality, serving_timeline
from refllm.figures.source_digest import SourceReader
from refllm.measure.records import Record


def sources(*definitions) -> str:
    return "\n".join(SourceReader().sources(*definitions))


def test_helpers_constants_and_imported_names_are_followed():
    text = sources(serving_timeline.draw_blocks)
    for part in ("@styled\ndef draw_blocks", "REQUESTS = (", "SHARED = -2", "def styled("):
        assert part in text
    assert "def draw_tree(" not in text
    # through a helper of a helper, and into a class
    assert "def _draw_line(" in sources(kv_quantization.draw)
    assert "KINDS = {" in sources(Record)


def test_a_parameter_is_not_the_module_s_function_of_the_same_name():
    text = sources(quantization_quality.draw)
    assert "def draw(values: Values)" in text
    assert "def values(" not in text  # what the record holds: it measures
    assert "HeldOutBench" not in text


def test_each_definition_stands_once_and_in_the_same_order():
    found = SourceReader().sources(kv_quantization.draw, serving_timeline.draw_tree)
    again = SourceReader().sources(serving_timeline.draw_tree, kv_quantization.draw)
    assert found == again
    assert len(set(found)) == len(found)
