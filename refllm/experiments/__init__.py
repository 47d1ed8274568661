"""What does a technique cost, and what does it gain? One file per experiment: what it
measures, and the figure that it draws.

Each is a program (``python -m refllm.experiments.NAME``) that writes figures/data/NAME.json;
``refllm figures`` draws the pictures. Read first: ``observer_ranges``, the shortest.

Quantisation of weights and activations

quantization_quality  KL, agreement and bits per byte by method, bits and group size
observer_ranges       where each observer clips a heavy-tailed tensor
outlier_injection     outlier channels for a network that has none, the same function bit for bit
salience              what it helps to keep 1 % of the channels in full precision
smoothquant           8-bit weights and activations with outliers, over α
float_formats         INT8 against E4M3 and E5M2; 14-bit accumulators; delayed scaling
fp8_training          training in 8 bits against training in float32
gguf_layouts          where the bits of a GGUF block lie
gguf_mixes            bits per weight of GGUF's mixes

The KV cache

kv_memory             bytes of one sequence's cache, by length
kv_quantization       KIVI against the other choices of axis
kv_sparsity           H2O, TOVA, SnapKV and others against the newest tokens alone

Serving

roofline              where the steps of an 8B model stand on a device's roofline
batching              static against continuous batching, chunked prefill, preemption
paging                mean batch by how memory is allocated
unpadding             the engine's 24× over padded batches, taken apart
prefix_caching        hit rates and speedups of two prefix caches on six programs
serving_timeline      one run of the scheduler, step by step
speculative_decoding  tokens per step and speedups

Structured output and programs

structured_output     real JSON Schemas on the pretrained model, with and without a grammar
language_programs     three programs that share prefixes, and the naive way

The pretrained model

real_bench            what experiments on it share: text, reference, calibration
real_activations      8- and 4-bit activations: scales, SmoothQuant, LLM.int8(), rotations

Training

training_curves       loss by tokens read, and by length of the context

``held_out_bench`` is what the experiments on quantised networks share. Figures of the three
longest experiments stand beside them (``*_figure``). Nothing is imported here: most
experiments need the engine or a model.
"""

__all__ = [
    "batching",
    "float_formats",
    "fp8_training",
    "gguf_layouts",
    "gguf_mixes",
    "held_out_bench",
    "kv_memory",
    "kv_quantization",
    "kv_sparsity",
    "observer_ranges",
    "outlier_injection",
    "paging",
    "prefix_caching",
    "quantization_quality",
    "roofline",
    "salience",
    "serving_timeline",
    "smoothquant",
    "speculative_decoding",
    "training_curves",
    "unpadding",
]
