"""The task that every training engine is given: network, batches, rates; all drawn from one
seed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from refllm.model.config import ModelConfig
from refllm.train.schedule import Phase, Plan


@dataclass(frozen=True)
class Task:
    """Train a network from random weights on random tokens, ``turn`` steps at a time."""

    network: dict  # a Hugging Face config.json
    batch: int
    length: int
    turn: int  # steps between two reports
    turns: int
    workers: int  # threads
    seed: int = 0

    @property
    def tokens_per_turn(self) -> int:
        return self.turn * self.batch * self.length

    def config(self) -> ModelConfig:
        return ModelConfig.from_hf(self.network)

    def plan(self) -> Plan:
        """One step more than is reported, so that the run never ends of itself and writes
        nothing.
        """
        phase = Phase(self.turns * self.turn + 1, self.batch, self.length)
        return Plan(
            (phase,),
            warmup=10,
            seed=self.seed,
            workers=self.workers,
            evaluate_every=self.turn,
            save_every=1 << 30,
        )

    def stream(self) -> np.ndarray:
        """Random tokens: the cost of a step does not depend on what the text says."""
        rng = np.random.default_rng(self.seed)
        return rng.integers(
            0, self.network["vocab_size"], 64 * self.batch * self.length, dtype=np.int32
        )
