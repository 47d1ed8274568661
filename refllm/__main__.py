"""``refllm`` and ``python -m refllm``: the command line, with the kernels of OpenBLAS chosen
before NumPy is imported.
"""

from __future__ import annotations

from refllm.openblas import prefer_fast_kernels


def main() -> None:
    """Run the command of this process's arguments, and exit."""
    prefer_fast_kernels()
    from refllm.cli import app  # imports NumPy

    app(prog_name="refllm")


if __name__ == "__main__":
    main()
