"""``refllm convert``: a checkpoint as one GGUF file, for llama.cpp and for refllm itself."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from refllm.cli.options import AnyModelOption, BackendOption, TokenizerOption, flag, opt
from refllm.cli.threads import ThreadsOption, use_threads
from refllm.errors import InputError
from refllm.terminal import console, format_bytes, note, pairs, progress

if TYPE_CHECKING:
    import numpy as np

ToOption = Annotated[Path, opt("The file to write.", "--to", metavar="FILE")]
TypeOption = Annotated[
    str, opt("The types of its tensors: Q4_K_M, Q8_0, F16 …", "--type", metavar="TYPE")
]
ImatrixOption = Annotated[
    bool, flag("Weight errors by the activations of calibration text.", "--imatrix")
]
WindowsOption = Annotated[int, opt("Windows of calibration text, with --imatrix.", min=1)]
LengthOption = Annotated[int, opt("Tokens per window.", min=2)]
SeedOption = Annotated[int, opt("Decides which windows are drawn.", min=0)]
WorkersOption = Annotated[
    int | None, opt("Processes that quantise in parallel.", min=1, show_default="one per core")
]
OverwriteOption = Annotated[bool, flag("Replace an existing file.", "--overwrite")]


def convert(
    to: ToOption,
    model: AnyModelOption = "stdlib",
    type: TypeOption = "Q4_K_M",
    imatrix: ImatrixOption = False,
    windows: WindowsOption = 64,
    length: LengthOption = 256,
    seed: SeedOption = 0,
    workers: WorkersOption = None,
    tokenizer: TokenizerOption = None,
    overwrite: OverwriteOption = False,
    threads: ThreadsOption = None,
    backend: BackendOption = "numpy",
) -> None:
    """Convert a checkpoint to GGUF.

    From a Hugging Face directory, or a GGUF file of F32, F16 or BF16, to a file that
    llama.cpp opens and refllm loads. The tokenizer goes with it. The calibration text is
    the standard library's source.

    \b
    Examples:
      refllm convert --to stdlib.gguf
      refllm convert --model ./Llama-3.2-1B --to llama.gguf --type Q5_K_M --imatrix
      refllm generate --model stdlib.gguf
    """
    from refllm.checkpoints.sources import locate
    from refllm.quant import to_gguf

    source = locate(model)
    to = to_gguf.writable(to, overwrite)
    computing = use_threads(threads)
    weights = None
    if imatrix:
        weights = _importance(source, tokenizer, windows, length, seed, backend)
    with progress("converting") as advance:
        made = to_gguf.convert(
            source,
            to,
            type,
            importance=weights,
            workers=workers,
            overwrite=overwrite,
            tokenizer=tokenizer,
            progress=advance,
        )
    for sentence in made.notes:
        note(sentence)
    counts = sorted(Counter(made.types.values()).items())
    lines = {
        "written": str(made.path),
        "size": f"{format_bytes(made.nbytes)}, {made.bits_per_weight:.3f} bits per weight",
        "tensors": ", ".join(f"{count} {name}" for name, count in counts),
        "computed with": computing,
    }
    pairs(console(), lines)


def _importance(
    source: Path, tokenizer: Path | None, windows: int, length: int, seed: int, backend: str
) -> dict[str, np.ndarray]:
    """Mean squares of each projection's inputs on calibration text."""
    from refllm.checkpoints.sources import is_gguf
    from refllm.quant.imatrix import importance
    from refllm.quant.layer_inputs import calibration_windows
    from refllm.quant.layer_io import CheckpointSource, ModelSource
    from refllm.quant.to_gguf import open_source

    config, own = open_source(source, tokenizer)
    if length > config.max_position_embeddings:
        longest = config.max_position_embeddings
        raise InputError(
            f"windows of {length} tokens are longer than the model's {longest} positions: "
            "lower --length"
        )
    text = calibration_windows(own, windows, length, seed, begin=config.bos_token_id)
    note(f"importance from {windows} windows of {length} tokens of the standard library's source")
    with progress("observing") as advance:
        if is_gguf(source):
            from refllm.api import load

            loaded = load(source, backend, tokenizer=tokenizer)
            return importance(ModelSource(loaded.config, loaded.weights), text, advance)
        with CheckpointSource(source, backend=backend) as layers:
            return importance(layers, text, advance)
