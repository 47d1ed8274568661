"""The two controls of speculative decoding: every draft right, and every draft wrong.

``PerfectDrafter`` shows the most that speculation can gain in accepted tokens, and
``AdversarialDrafter`` that the output distribution does not depend on the drafts.
"""

from __future__ import annotations

import numpy as np

from refllm.backend import Array, namespace
from refllm.decode.sampling_params import SamplingParams
from refllm.decode.speculative.model_drafter import ModelDrafter


class PerfectDrafter(ModelDrafter):
    """The target drafts for itself, so p = q: every draft is accepted, and no time is saved."""


class AdversarialDrafter(ModelDrafter):
    """Drafts the token that the model finds least likely: as wrong as a drafter can be, and
    the output distribution must not change.
    """

    def _choose(
        self, z: Array, sampling: SamplingParams, rng: np.random.Generator
    ) -> tuple[int | None, Array | None]:
        return int(namespace(z).argmin(z)), None
