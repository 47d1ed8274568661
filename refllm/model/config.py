"""The plain record of a network's shape, as a Hugging Face ``config.json`` states it.

One dataclass covers the four supported families, which differ in five switches only:

| family  | attention_bias | qk_norm | sliding_window | head_dim            |
|---------|----------------|---------|----------------|---------------------|
| llama   | no             | no      | no             | hidden / heads      |
| mistral | no             | no      | optional       | hidden / heads      |
| qwen2   | q, k, v        | no      | no             | hidden / heads      |
| qwen3   | no             | yes     | no             | stated in the file  |

Left out: other families, MLP biases, mixture of experts, RoPE scalings other than ``llama3``
(``yarn``, ``dynamic``, ``linear`` …). Each is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}


class UnsupportedModel(ValueError):  # noqa: N818 (it names the thing refused)
    """The configuration asks for something that refllm does not compute."""


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's frequency scaling: long wavelengths are stretched, short ones kept (see ``layers``)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class ModelConfig:
    """Shape and constants of a decoder. Letters: N hidden, H heads, G key/value heads, D head_dim, V vocab."""

    family: str
    vocab_size: int  # V
    hidden_size: int  # N
    intermediate_size: int  # width of the MLP
    num_hidden_layers: int  # L
    num_attention_heads: int  # H
    num_key_value_heads: int  # G
    head_dim: int  # D
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    max_position_embeddings: int = 2048
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                     "num_attention_heads", "num_key_value_heads", "head_dim"):  # fmt: skip
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise UnsupportedModel(f"config: {name} must be a positive integer, got {value!r}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise UnsupportedModel(
                f"config: {self.num_attention_heads} attention heads do not divide into "
                f"{self.num_key_value_heads} key/value heads"
            )
        if self.head_dim % 2:
            raise UnsupportedModel(f"config: head_dim must be even for RoPE, got {self.head_dim}")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise UnsupportedModel(f"config: sliding_window must be positive, got {self.sliding_window}")

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> ModelConfig:
        """Read a Hugging Face ``config.json`` (both the flat and the ``rope_parameters`` spelling)."""
        family = _family(raw)
        try:
            hidden, heads = int(raw["hidden_size"]), int(raw["num_attention_heads"])
            sizes = {k: int(raw[k]) for k in ("vocab_size", "intermediate_size", "num_hidden_layers")}
        except KeyError as missing:
            raise UnsupportedModel(f"config: {missing} is missing") from missing
        if raw.get("mlp_bias") or (raw.get("attention_bias") and family != "qwen2"):
            raise UnsupportedModel(f"config: biases are supported in qwen2's q, k, v only, not in {family}")
        if raw.get("hidden_act", "silu") not in ("silu", "swish"):
            raise UnsupportedModel(f"config: hidden_act {raw['hidden_act']!r} is not supported, only 'silu'")
        theta, scaling = _rope(raw)
        # Qwen carries a window that is off unless use_sliding_window says so; Mistral's is on if present.
        windowed = family == "mistral" or bool(raw.get("use_sliding_window"))
        if windowed and family != "mistral":
            raise UnsupportedModel(f"config: use_sliding_window is supported in mistral only, not in {family}")
        eos = raw.get("eos_token_id")
        return cls(
            family=family,
            hidden_size=hidden,
            num_attention_heads=heads,
            num_key_value_heads=int(raw.get("num_key_value_heads") or heads),
            head_dim=int(raw.get("head_dim") or hidden // max(heads, 1)),
            rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
            rope_theta=theta,
            rope_scaling=scaling,
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            attention_bias=family == "qwen2",
            qk_norm=family == "qwen3",
            sliding_window=raw.get("sliding_window") if windowed else None,
            max_position_embeddings=int(raw.get("max_position_embeddings", 2048)),
            bos_token_id=raw.get("bos_token_id"),
            eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (int(eos),),
            **sizes,
        )

    def to_hf(self) -> dict[str, Any]:
        """The ``config.json`` that ``transformers`` reads; ``from_hf`` of it gives this record back."""
        architecture = next(a for a, f in ARCHITECTURES.items() if f == self.family)
        raw: dict[str, Any] = {"architectures": [architecture], "model_type": self.family, "hidden_act": "silu"}
        own = asdict(self)
        for key in ("family", "qk_norm", "attention_bias", "rope_scaling", "sliding_window", "eos_token_ids"):
            own.pop(key)
        raw.update(own)
        if self.rope_scaling is not None:
            raw["rope_scaling"] = {"rope_type": "llama3", **asdict(self.rope_scaling)}
        if self.family == "mistral":
            raw["sliding_window"] = self.sliding_window
        eos = list(self.eos_token_ids)
        raw["eos_token_id"] = eos[0] if len(eos) == 1 else eos or None
        raw["torch_dtype"] = "float16"
        return raw

    @property
    def num_parameters(self) -> int:
        """Stored parameters: specs §1, N = L·N_l + V·d·(1 if tied else 2) plus the norms and biases."""
        n, d = self.hidden_size, self.head_dim
        h, g = self.num_attention_heads, self.num_key_value_heads
        per_layer = n * d * (2 * h + 2 * g) + 3 * n * self.intermediate_size + 2 * n
        per_layer += d * (h + 2 * g) if self.attention_bias else 0
        per_layer += 2 * d if self.qk_norm else 0
        return self.num_hidden_layers * per_layer + n + self.vocab_size * n * (1 if self.tie_word_embeddings else 2)


def _family(raw: Mapping[str, Any]) -> str:
    names = raw.get("architectures") or []
    supported = ", ".join(ARCHITECTURES)
    if not isinstance(names, list) or not names:
        raise UnsupportedModel(f"config: no 'architectures' entry; supported are {supported}")
    if names[0] not in ARCHITECTURES:
        raise UnsupportedModel(f"config: architecture {names[0]!r} is not supported; supported are {supported}")
    return ARCHITECTURES[names[0]]


def _rope(raw: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Return (theta, scaling) from ``rope_parameters`` (transformers ≥ 5) or the older flat keys."""
    parameters = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    theta = float(parameters.get("rope_theta", raw.get("rope_theta", 10_000.0)))
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise UnsupportedModel(f"config: RoPE scaling {kind!r} is not supported; supported are 'default', 'llama3'")
    return theta, RopeScaling(
        factor=float(parameters["factor"]),
        low_freq_factor=float(parameters["low_freq_factor"]),
        high_freq_factor=float(parameters["high_freq_factor"]),
        original_max_position_embeddings=int(parameters["original_max_position_embeddings"]),
    )
