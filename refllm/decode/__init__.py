"""Which token comes next? Logits processors and sampling turn logits into a token;
generation repeats this for a static batch; ``speculative/`` emits several tokens per step;
and a detokenizer turns token ids into text. Read ``sampling`` first.

1. ``sampling_params``: ``SamplingParams``, and the checks of its values.
2. ``sampling``: temperature, top-k, top-p, min-p; drawing by inverse CDF.
3. ``penalties``: repetition, presence and frequency penalties.
4. ``constraint``: which tokens a grammar allows, and its states along an output;
   ``grammar/`` compiles grammars.
5. ``logits_processors``: the grammar's mask, biases, bad words, penalties and the user's own, in
   their order.
6. ``margin``: how far logits may move before a sampled token changes.
7. ``logprobs``: log-probabilities of outputs and prompts.
8. ``generate``: prefill and decode of a static batch.
9. ``detokenizer``: whole characters from token ids, and stop strings.
10. ``output_params``, ``completion``: where an output ends, and what is reported of it.
11. ``cached_sequence``, ``conversation``: a chat whose turns compute only what is new.
12. ``jump_forward``: what a grammar forces, appended without sampling.
13. ``speculative/``: drafters and the acceptance rules that verify them.
14. ``fast/``: decode steps without Python's overhead; skip it on a first reading.
"""

from refllm.decode.cached_sequence import CachedSequence
from refllm.decode.completion import CompletionOutput, StreamChunk
from refllm.decode.constraint import Constraint, ConstraintFailure, NoTokenLeft
from refllm.decode.conversation import Conversation
from refllm.decode.detokenizer import StopStrings, Utf8Stream
from refllm.decode.generate import generate_tokens
from refllm.decode.logits_processors import LogitsProcessors, process_rows
from refllm.decode.logprobs import Logprob
from refllm.decode.output_params import OutputParams
from refllm.decode.penalties import apply_count_penalties, apply_repetition_penalty
from refllm.decode.sampling import log_probabilities, process_logits, sample
from refllm.decode.sampling_params import GREEDY, SamplingParams
from refllm.decode.speculative.loop import speculate
from refllm.decode.speculative.verification import (
    residual,
    verify,
    verify_block,
    verify_greedy,
)

__all__ = [
    "GREEDY",
    "CachedSequence",
    "CompletionOutput",
    "Constraint",
    "ConstraintFailure",
    "Conversation",
    "LogitsProcessors",
    "Logprob",
    "NoTokenLeft",
    "OutputParams",
    "SamplingParams",
    "StopStrings",
    "StreamChunk",
    "Utf8Stream",
    "apply_count_penalties",
    "apply_repetition_penalty",
    "generate_tokens",
    "log_probabilities",
    "process_logits",
    "process_rows",
    "residual",
    "sample",
    "speculate",
    "verify",
    "verify_block",
    "verify_greedy",
]
