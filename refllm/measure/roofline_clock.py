"""A clock for simulated serving: the roofline's time of every step on a named device, and
the time to swap blocks over its link to the host.

| symbol | name                                 | value                                     |
|--------|--------------------------------------|-------------------------------------------|
| t      | seconds of a step                    | max(FLOP / peak, bytes / peak) + overhead |
| m      | seconds to move n tokens in k blocks | n·kv / link + k·2L·latency                |

The costs are those of ``measure.roofline.step_cost``, summed over the batch in one loop,
since a simulation asks a million times. All times are lower bounds: projected, not
measured.

Sources: see ``measure.roofline``; a link of 25 GB/s is what PCIe 4.0 x16 yields, and 5 µs
for each copy, of which a block needs two per layer (keys and values), is an assumption.

Left out: what ``measure.roofline`` leaves out; copies that overlap with computing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from refllm.errors import InputError
from refllm.measure.device import DeviceSpec
from refllm.measure.memory import kv_bytes_per_token, max_tokens
from refllm.measure.roofline import keys_read, keys_seen, layer_parameters
from refllm.model.config import ModelConfig

DEVICE_MEMORY = {"h200": 141e9, "a100": 80e9}  # bytes, by the data sheets


@dataclass
class RooflineClock:
    """Seconds of steps of ``config`` on ``device``; a ``simulate.simulator.Clock``."""

    config: ModelConfig
    device: DeviceSpec
    weight_bytes_per_param: float = 2.0
    kv_bytes_per_value: float = 2.0
    link: float = 25e9  # bytes/s between device and host
    latency: float = 5e-6  # seconds per copy

    def __post_init__(self) -> None:
        c = self.config
        b = self.weight_bytes_per_param
        if not (self.link > 0 and self.latency >= 0):
            raise InputError(
                "a link needs a rate above 0 and a latency of 0 or more, "
                f"got {self.link}, {self.latency}"
            )
        head = c.vocab_size * c.hidden_size
        self._layers = 2 * c.num_hidden_layers * layer_parameters(c)  # FLOP per token
        self._head = 2 * head  # FLOP per row of logits
        # FLOP per key attended to
        self._attention = 4 * c.num_hidden_layers * c.num_attention_heads * c.head_dim
        self._stored = b * (c.num_parameters - head * (1 if c.tie_word_embeddings else 2))
        self._head_bytes = b * head
        self._row = b * c.hidden_size
        self._kv = kv_bytes_per_token(c, 8 * self.kv_bytes_per_value)

    def step(self, batch: Sequence[tuple[int, int]], rows: int) -> float:
        """Seconds of a step over (past, new) of each sequence, with ``rows`` rows of logits."""
        tokens = 0
        seen = 0
        read = 0
        window = self.config.sliding_window
        for past, new in batch:
            tokens += new
            seen += keys_seen(past, new, window)
            read += keys_read(past, new, window)
        if tokens == 0:
            return 0.0
        flops = self._layers * tokens + self._head * rows + self._attention * seen
        moved = self._stored + self._row * tokens + self._kv * (read + tokens)
        if rows:
            moved += self._head_bytes
        limit = max(flops / self.device.peak_flops, moved / self.device.peak_bandwidth)
        return limit + self.device.overhead

    def decode(self, pasts: Sequence[int], count: int) -> list[float]:
        """Seconds of each of ``count`` steps that compute one token for every sequence;
        ``pasts`` tokens are cached before the first step.
        """
        rows = len(pasts)
        window = self.config.sliding_window
        # keys that the queries attend to, of all sequences together: [count]
        keys = sum(pasts) + rows * np.arange(1, count + 1)
        if window is not None:
            grown = np.asarray(pasts)[:, None] + np.arange(1, count + 1)  # [B, count]
            keys = np.minimum(grown, window).sum(axis=0)
        flops = (self._layers + self._head) * rows + self._attention * keys
        moved = self._stored + self._head_bytes + self._row * rows + self._kv * (keys + rows)
        limits = np.maximum(flops / self.device.peak_flops, moved / self.device.peak_bandwidth)
        seconds: list[float] = (limits + self.device.overhead).tolist()
        return seconds

    def move(self, tokens: int, blocks: int) -> float:
        """Seconds to move keys and values between device and host, block by block."""
        return (
            tokens * self._kv / self.link
            + blocks * 2 * self.config.num_hidden_layers * self.latency
        )

    def slots(self, memory: float) -> int:
        """Tokens of context that fit into ``memory`` bytes beside the weights; ValueError if
        none does.
        """
        fit = max_tokens(
            self.config,
            memory,
            bits=8 * self.weight_bytes_per_param,
            kv_bits=8 * self.kv_bytes_per_value,
        )
        if fit < 1:
            raise InputError(
                f"{memory / 1e9:.3g} GB are too little for "
                f"{self.config.num_parameters / 1e9:.3g} billion parameters and any context: "
                "take more memory or fewer bytes per weight"
            )
        return fit
