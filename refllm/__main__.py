"""``python -m refllm``: the command line without an installed script."""

from refllm.cli import app

if __name__ == "__main__":
    app(prog_name="refllm")
