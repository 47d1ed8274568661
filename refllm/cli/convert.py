"""``refllm convert``: a checkpoint as one GGUF file, for llama.cpp and for refllm itself."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from refllm.cli.options import AnyModelOption, BackendOption, flag, opt
from refllm.terminal import console, format_bytes, note, pairs, progress

ToOption = Annotated[Path, opt("The file to write.", "--to", metavar="FILE")]
TypeOption = Annotated[
    str, opt("Which types its tensors get: Q4_K_M, Q8_0, F16 …", "--type", metavar="TYPE")
]
ImatrixOption = Annotated[
    bool, flag("Weigh errors by the activations of calibration text.", "--imatrix")
]
WindowsOption = Annotated[int, opt("Windows of calibration text, with --imatrix.", min=1)]
LengthOption = Annotated[int, opt("Tokens of each.", min=2)]
SeedOption = Annotated[int, opt("Of their choice.", min=0)]
WorkersOption = Annotated[
    int | None, opt("Processes that encode side by side.", min=1, show_default="one a core")
]
OverwriteOption = Annotated[bool, flag("Replace the file if it is there.", "--overwrite")]


def convert(
    to: ToOption,
    model: AnyModelOption = "stdlib",
    type: TypeOption = "Q4_K_M",
    imatrix: ImatrixOption = False,
    windows: WindowsOption = 64,
    length: LengthOption = 256,
    seed: SeedOption = 0,
    workers: WorkersOption = None,
    overwrite: OverwriteOption = False,
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
    from refllm.checkpoints.loading import locate
    from refllm.quant.to_gguf import convert as convert_file
    from refllm.quant.to_gguf import free

    source = locate(model)
    to = free(to, overwrite)
    if imatrix:
        weights = _importance(source, windows, length, seed, backend)
    else:
        weights = None
    with progress("converting") as advance:
        made = convert_file(
            source,
            to,
            type,
            importance=weights,
            workers=workers,
            overwrite=overwrite,
            progress=advance,
        )
    counts: dict[str, int] = {}
    for stored in made.types.values():
        counts[stored] = counts.get(stored, 0) + 1
    pairs(
        console(),
        {
            "written": str(made.path),
            "size": f"{format_bytes(made.nbytes)}, {made.bits_per_weight:.3f} bits per weight",
            "tensors": ", ".join(f"{count} {stored}" for stored, count in sorted(counts.items())),
        },
    )


def _importance(source: Path, windows: int, length: int, seed: int, backend: str) -> Any:
    """Mean squares of the activations on training text."""
    from refllm.checkpoints.loading import is_gguf
    from refllm.quant.calibration_data import calibration_windows
    from refllm.quant.imatrix import importance
    from refllm.quant.layer_io import CheckpointSource, ModelSource
    from refllm.quant.to_gguf import open_source

    config, tokenizer = open_source(source)
    if length > config.max_position_embeddings:
        longest = config.max_position_embeddings
        raise ValueError(
            f"windows of {length} tokens are longer than the model's {longest} positions: lower --length"
        )
    text = calibration_windows(tokenizer, windows, length, seed, begin=config.bos_token_id)
    note(f"importance from {windows} windows of {length} tokens of the standard library's source")
    with progress("observing") as advance:
        if is_gguf(source):
            from refllm.api import load

            loaded = load(source, backend)
            return importance(ModelSource(loaded.config, loaded.weights), text, advance)
        with CheckpointSource(source, backend=backend) as layers:
            return importance(layers, text, advance)
