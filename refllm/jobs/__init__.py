"""Long work: how does a whole checkpoint get quantised or trained, with progress and resume?

Read ``quantize`` first: ``prepare`` makes every check, ``run`` does the work, layer by layer.

- ``quantize``       a checkpoint in fewer bits, from directory to directory
- ``train``          a model from text files, with checkpoints
- ``train_options``  network and phases of a training run, from a few numbers
- ``publish``        a training state as a model directory with card and manifest
- ``model_card``     the record of a trained model: every number computed
- ``card_page``      that record as a page of Markdown

Import the modules: ``from refllm.jobs import quantize``; ``quantize.prepare`` and
``quantize.run``, ``train.prepare`` and ``train.run`` go together.
"""

from refllm.jobs import quantize, train

__all__ = ["quantize", "train"]
