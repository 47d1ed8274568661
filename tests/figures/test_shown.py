"""A figure shows what its record holds: each kind of number that changes, changes the picture."""

from __future__ import annotations

import pytest

from drawn import hidden
from figure_examples import EXAMPLES
from refllm.figures.registry import FIGURES

# what a record holds besides what its figure shows
NOT_SHOWN = {
    "training_curve": {"bytes_per_token", "runs.draft.norm", "runs.target.norm"},
    "kv_quantization": {"length", "rows.kl by position"},
    "quantization": {"rows.seed"},
    "observers": {"rows.beyond"},
    "salience": {"rows.seed"},
    "batching": {
        *(f"chunks.{what}.{which}" for what in ("itl", "ttft") for which in ("mean", "p90", "max")),
        "chunks.throughput",
        "goodput.limits.e2el",
    },
    "structured_output": {"rows.tokens", "rows.jumped", "walk.mass"},
    "prefixes": {"inside.hash", "inside.radix"},
    "serving_occupancy": {f"occupancy.{what}" for what in ("preempted", "read", "written")},
    "serving_blocks": {"blocks.times"},
    "serving_tree": {
        f"tree.{what}" for what in ("locks", "used", "children.locks", "children.used")
    },
}
# of a record that several figures share, the part that each shows
PARTS = {
    "serving_occupancy": "occupancy",
    "serving_blocks": "blocks",
    "serving_tree": "tree",
    "speculative_batch": "batches",
    "speculative": "results",
}


@pytest.mark.parametrize("name", FIGURES)
def test_every_kind_of_number_is_drawn(name: str):
    values = EXAMPLES[name]

    def draw(part):
        return FIGURES[name][1](values | part)

    part = PARTS.get(name)
    shown = {part: values[part]} if part else values
    assert hidden(draw, shown) == NOT_SHOWN.get(name, set())
