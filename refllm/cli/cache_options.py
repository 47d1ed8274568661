"""The options of commands whose cache can keep less: keys and values in few bits, or of
some of the tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

from refllm.cli.options import opt

if TYPE_CHECKING:
    from refllm.kv.kivi import Kivi
    from refllm.kv.sparse import Sparse
    from refllm.model.config import ModelConfig

KvBitsOption = Annotated[
    int | None,
    opt("Keep keys and values in N bits, as KIVI does.", min=1, max=8, show_default="off"),
]
KvGroupOption = Annotated[int | None, opt("Numbers that share a step.", min=1, show_default="32")]
KvResidualOption = Annotated[
    int | None, opt("Newest tokens that stay as they are.", min=1, show_default="128")
]
KvKeepOption = Annotated[
    int | None,
    opt("Keep N tokens a key head (snapkv, pyramidkv: of the prompt).", min=1, show_default="all"),
]
KvPolicyOption = Annotated[
    str | None,
    opt(
        "Which tokens are kept; settings as in the papers.",
        metavar="snapkv|h2o|tova|streaming|pyramidkv|recent",
        show_default="snapkv",
    ),
]


def kivi_of(
    config: ModelConfig, bits: int | None, group: int | None, residual: int | None
) -> Kivi | None:
    """The settings that the options ask for; None without ``--kv-bits``.

    ValueError for a group or residual without it, and for settings that do not fit the
    model's heads.
    """
    from refllm.kv.kivi import Kivi

    if bits is None:
        if group is not None or residual is not None:
            raise ValueError(
                "--kv-group and --kv-residual say how the cache is quantised: say to how many --kv-bits"
            )
        return None
    given = {
        name: value
        for name, value in (("group", group), ("residual", residual))
        if value is not None
    }
    if group is not None:
        # before a residual is asked for that fits it
        Kivi(bits, bits, group, 32 * group).check(config.head_dim)
    kivi = Kivi(bits, bits, **given)
    kivi.check(config.head_dim)
    return kivi


def sparse_of(keep: int | None, name: str | None) -> Sparse | None:
    """The policy that the options ask for; None without ``--kv-keep``."""
    from refllm.kv import sparse

    if keep is None:
        if name is not None:
            raise ValueError("--kv-policy says which tokens are kept: say how many with --kv-keep")
        return None
    policies: dict[str, Callable[[int], Sparse]] = {
        "snapkv": sparse.snapkv,
        "h2o": sparse.h2o,
        "tova": sparse.tova,
        "streaming": sparse.streaming,
        "pyramidkv": sparse.pyramidkv,
        "recent": sparse.recent_only,
    }
    if name is not None and name not in policies:
        raise ValueError(f"--kv-policy {name}: there is none; choose one of {', '.join(policies)}")
    return policies[name or "snapkv"](keep)


def told(policy: Kivi | Sparse, config: ModelConfig, prompt: int, new: int) -> str:
    """What is used of the cache after a prompt and some tokens more, and would be in full."""
    from refllm.kv.kivi import Kivi
    from refllm.measure.memory import human, kv_bytes

    tokens = prompt + new
    full = kv_bytes(config, tokens, bits=32)
    if not isinstance(policy, Kivi):
        held = policy.held(prompt, new, config.num_hidden_layers) / config.num_hidden_layers
        size = human(full * held / tokens)
        return f"cache: {size} of float32 instead of {human(full)}, {held:,.0f} of {tokens:,} tokens a key head"
    kivi = policy
    small = policy.nbytes(config, tokens, full=32)
    if small == full:
        why = f"{tokens} tokens are fewer than the {kivi.residual} that wait"
        return f"cache: {human(full)}, nothing of it quantised: {why}"
    return (
        f"cache: {human(small)} instead of {human(full)} of float32, in {kivi.key_bits}-bit codes but for the newest "
        f"tokens, {kivi.residual} at most"
    )
