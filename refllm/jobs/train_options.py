"""The network and the schedule of a training run, derived from a few numbers.

| default                  | rule                                                         |
|--------------------------|--------------------------------------------------------------|
| heads                    | one per 64 columns of the width                              |
| key/value heads          | half the heads, or the largest divisor of the heads below it |
| MLP                      | three times the width                                        |
| steps with long windows  | the last 15 %                                                |

Left out: searching for good settings.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from refllm.errors import InputError
from refllm.model.config import ModelConfig
from refllm.train.data import Data
from refllm.train.schedule import Phase

LONG_SHARE = 0.15  # of the steps, at the end, read long windows
# with gradients and moments, a parameter takes 16 bytes: more than any one device holds
MAX_PARAMETERS = 10**10


@dataclass(frozen=True)
class TrainingOptions:
    """The network and the schedule as a user gives them; None is derived from the others.

    >>> TrainingOptions(width=128).config(vocab_size=4096, begin=0).num_attention_heads
    2
    """

    vocab_size: int = 4096
    width: int = 256
    layers: int = 4
    heads: int | None = None
    kv_heads: int | None = None
    mlp: int | None = None
    context: int = 2048
    steps: int = 12_500
    batch: int = 8
    length: int = 256
    long_steps: int | None = None
    long_length: int = 1024
    explicit: tuple[
        Phase, ...
    ] = ()  # if given, the phases: the fields from ``steps`` on are unused

    def config(self, vocab_size: int, begin: int) -> ModelConfig:
        """The network; ValueError if the numbers make none."""
        heads = self.heads or max(1, self.width // 64)
        if self.width % heads:
            raise InputError(f"a width of {self.width} does not divide into {heads} heads")
        kv_heads = next(g for g in range(max(1, heads // 2), 0, -1) if heads % g == 0)
        config = ModelConfig(
            "llama",
            vocab_size,
            self.width,
            self.mlp or 3 * self.width,
            self.layers,
            heads,
            self.kv_heads or kv_heads,
            self.width // heads,
            tie_word_embeddings=True,
            max_position_embeddings=self.context,
            bos_token_id=begin,
            eos_token_ids=(begin,),
        )
        if config.num_parameters > MAX_PARAMETERS:
            raise InputError(
                f"{config.num_parameters:,} parameters are more than can be trained here: "
                f"{MAX_PARAMETERS:,}"
            )
        return config

    def phases(self, data: Data) -> tuple[Phase, ...]:
        """Short windows, then long ones with about as many tokens per step.

        Raises
        ------
        ValueError
            if they do not fit into the steps or the context.
        """
        if self.explicit:
            return self._explicit_phases(data)
        if self.steps < 1:
            raise InputError(f"a run needs at least one step, got {self.steps}")
        long = self.long_steps
        if long is None:
            long = int(LONG_SHARE * self.steps)
        if not 0 <= long <= self.steps:
            raise InputError(f"{long} long steps do not fit into {self.steps} steps")
        longest = max(self.length, self.long_length if long else 0)
        if longest > self.context:
            raise InputError(
                f"windows of {longest} tokens are longer than the context of {self.context}"
            )
        short = Phase(self.steps - long, self.batch, self.length, data.repeats)
        if not long:
            return (short,)
        long_batch = max(1, self.batch * self.length // self.long_length)
        return (short, Phase(long, long_batch, self.long_length, data.last_repeats))

    def _explicit_phases(self, data: Data) -> tuple[Phase, ...]:
        """The explicit phases, with the data's repeats where they give none."""
        phases = tuple(p if p.repeats else replace(p, repeats=data.repeats) for p in self.explicit)
        for p in phases:
            if p.length > self.context:
                raise InputError(
                    f"windows of {p.length} tokens are longer than the context of {self.context}"
                )
            if len(p.repeats) != len(data.streams):
                raise InputError(
                    f"a phase has {len(p.repeats)} repeats for {len(data.streams)} streams of text"
                )
            if p.steps and not any(p.repeats):
                raise InputError(
                    "a phase leaves out every stream of text: it needs a repeat above zero"
                )
        if not any(p.steps for p in phases):
            raise InputError("a run needs at least one step, the phases have none")
        return phases
