"""Which committed figure is drawn from which record, and is it up to date?

The drawing itself stands in the experiments (``refllm.experiments``), the style in
``measure.plotting``. Read first: ``registry``.

registry       FIGURES; draw the pictures, and report the stale ones
source_digest  which code decides what a picture looks like
"""

from refllm.figures.registry import FIGURES, check, redraw, save

__all__ = ["FIGURES", "check", "redraw", "save"]
