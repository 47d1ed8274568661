"""The options of commands that can keep keys and values in few bits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from refllm.cli.shared import opt

if TYPE_CHECKING:
    from refllm.kv.kivi import Kivi
    from refllm.model.config import ModelConfig

KvBitsOption = Annotated[
    int | None, opt("Keep keys and values in N bits, as KIVI does.", min=1, max=8, show_default="off")
]
KvGroupOption = Annotated[int | None, opt("Numbers that share a step.", min=1, show_default="32")]
KvResidualOption = Annotated[int | None, opt("Newest tokens that stay as they are.", min=1, show_default="128")]


def kivi_of(config: ModelConfig, bits: int | None, group: int | None, residual: int | None) -> Kivi | None:
    """The settings that the options ask for; None without ``--kv-bits``.

    ValueError for a group or residual without it, and for settings that do not fit the model's heads.
    """
    from refllm.kv.kivi import Kivi

    if bits is None:
        if group is not None or residual is not None:
            raise ValueError("--kv-group and --kv-residual say how the cache is quantised: say to how many --kv-bits")
        return None
    given = {name: value for name, value in (("group", group), ("residual", residual)) if value is not None}
    kivi = Kivi(bits, bits, **given)
    kivi.check(config.head_dim)
    return kivi


def told(kivi: Kivi, config: ModelConfig, tokens: int) -> str:
    """What is used of the cache after so many tokens, and would be in full."""
    from refllm.study.memory import human, kv_bytes

    small, full = kivi.nbytes(config, tokens, full=32), kv_bytes(config, tokens, bits=32)
    if small == full:
        why = f"{tokens} tokens are fewer than the {kivi.residual} that wait"
        return f"cache: {human(full)}, nothing of it quantised: {why}"
    return (
        f"cache: {human(small)} instead of {human(full)}, in {kivi.key_bits}-bit codes but for the newest tokens, "
        f"{kivi.residual} at most"
    )
