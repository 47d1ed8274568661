"""Options for a smaller KV cache: keys and values in few bits, or of some tokens only."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

from refllm.cli.options import opt

if TYPE_CHECKING:
    from refllm.kv.kivi import Kivi
    from refllm.kv.sparse import SparsePolicy
    from refllm.model.config import ModelConfig

KvBitsOption = Annotated[
    int | None,
    opt("Keep keys and values in N bits, as KIVI does.", min=1, max=8, show_default="off"),
]
KvGroupOption = Annotated[int | None, opt("Values that share a scale.", min=1, show_default="32")]
KvResidualOption = Annotated[
    int | None, opt("Newest tokens kept in full precision.", min=1, show_default="128")
]
KvKeepOption = Annotated[
    int | None,
    opt(
        "Keep N tokens per key head (snapkv, pyramidkv: of the prompt).",
        min=1,
        show_default="all",
    ),
]
KvPolicyOption = Annotated[
    str | None,
    opt(
        "Which tokens are kept; settings as in the papers.",
        metavar="snapkv|h2o|tova|streaming|pyramidkv|recent",
        show_default="snapkv",
    ),
]


def kivi_from_options(
    config: ModelConfig, bits: int | None, group: int | None, residual: int | None
) -> Kivi | None:
    """The KIVI settings of the options; None without ``--kv-bits``.

    ValueError for a group or residual without it, and for settings that do not fit the
    model's heads.
    """
    from refllm.kv.kivi import Kivi

    if bits is None:
        if group is not None or residual is not None:
            raise ValueError(
                "--kv-group and --kv-residual only apply to a quantised cache: add --kv-bits"
            )
        return None
    if group is not None:
        # a group that does not fit the heads is reported before a residual that does not fit it
        Kivi(bits, bits, group, 32 * group).check(config.head_dim)
    settings = {"group": group, "residual": residual}
    kivi = Kivi(bits, bits, **{name: n for name, n in settings.items() if n is not None})
    kivi.check(config.head_dim)
    return kivi


def sparse_from_options(keep: int | None, name: str | None) -> SparsePolicy | None:
    """The sparse policy of the options; None without ``--kv-keep``."""
    from refllm.kv import sparse

    if keep is None:
        if name is not None:
            raise ValueError("--kv-policy says which tokens are kept: say how many with --kv-keep")
        return None
    policies: dict[str, Callable[[int], SparsePolicy]] = {
        "snapkv": sparse.snapkv,
        "h2o": sparse.h2o,
        "tova": sparse.tova,
        "streaming": sparse.streaming,
        "pyramidkv": sparse.pyramidkv,
        "recent": sparse.recent_only,
    }
    if name is not None and name not in policies:
        raise ValueError(f"unknown --kv-policy {name}; choose one of {', '.join(policies)}")
    return policies[name or "snapkv"](keep)


def cache_summary(policy: Kivi | SparsePolicy, config: ModelConfig, prompt: int, new: int) -> str:
    """The memory of a cache after a prompt and ``new`` further tokens, against a full
    float32 cache.
    """
    from refllm.kv.kivi import Kivi
    from refllm.measure.memory import human, kv_bytes

    tokens = prompt + new
    full = kv_bytes(config, tokens, bits=32)
    if not isinstance(policy, Kivi):
        held = policy.tokens_held(prompt, new, config.num_hidden_layers) / config.num_hidden_layers
        return (
            f"cache: {human(full * held / tokens)} instead of {human(full)} of float32, "
            f"{held:,.0f} of {tokens:,} tokens per key head"
        )
    small = policy.nbytes(config, tokens, full=32)
    if small == full:
        return (
            f"cache: {human(full)}, nothing quantised: {tokens} tokens fit into the "
            f"full-precision window of {policy.residual}"
        )
    return (
        f"cache: {human(small)} instead of {human(full)} of float32, in "
        f"{policy.key_bits}-bit codes except for the newest tokens, at most "
        f"{policy.residual}"
    )
