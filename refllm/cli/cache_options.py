"""Options for a smaller KV cache: keys and values in few bits, or of some tokens only."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

from refllm.cli.options import opt
from refllm.errors import InputError, alternatives

if TYPE_CHECKING:
    from refllm.kv.interface import CachePolicy
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
            raise InputError(
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
            raise InputError("--kv-policy says which tokens are kept: say how many with --kv-keep")
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
        raise InputError(f"unknown --kv-policy {name}; {alternatives(name, policies)}")
    return policies[name or "snapkv"](keep)


def cache_summary(policy: CachePolicy, config: ModelConfig, prompt: int, new: int) -> str:
    """The memory of a cache after a prompt and ``new`` further tokens, against a full
    float32 cache.
    """
    from refllm.measure.memory import human, kv_bytes

    full = human(kv_bytes(config, prompt + new, bits=32))
    nbytes, kept = policy.usage(config, prompt, new)
    if nbytes is None:
        return f"cache: {full}, {kept}"
    return f"cache: {human(nbytes)} instead of {full} of float32, {kept}"
