"""Serving: which request runs when, in which blocks of the KV cache, and what comes of it.

Read ``minimal`` first: continuous batching over a paged cache in 150 lines. Then the life of
a request in the full engine:

1. ``request.py``: a ``Request`` is checked; ``engine.py`` encodes its prompt (``prompts.py``)
   and queues it with ``scheduler.submit``, as one ``Sequence``.
2. ``adaptive_drafts.py``: drafters propose tokens for the running sequences, if the engine
   has any.
3. ``scheduler.py``: ``plan`` schedules running sequences, preempts some if memory runs out,
   and admits waiting ones in the order of ``admission.py``.
4. ``kv_manager.py``, ``prefix_caching.py``: the scheduler asks them for blocks, and which
   prefix is cached already.
5. ``model_runner.py``: the ``Plan`` (``plan.py``) is executed, one ragged batch through the
   network over ``kv.paged``.
6. ``model_runner.py``: logits processors (``decode``), sampling, verification of drafts and
   ``beam_search.py`` turn logits into the next tokens; ``request_state.py`` says which of them
   end a sequence.
7. ``base_scheduler.py``: ``update`` appends the tokens, forks and finishes sequences, and
   frees their blocks.
8. ``engine.py``: callbacks receive each ``SequenceUpdate``, with text from
   ``detokenizer.py``; ``run`` returns a ``RequestOutput`` (``outputs.py``).

Beside this path: ``async_engine`` (a thread that steps the engine, for any number of threads
and tasks), ``isolation`` (an error of one request ends that request alone), ``deadlines``
(when requests time out), ``factory`` (schedulers by name), ``swapping`` (preemption to host
memory), ``draft_costs`` (how many drafts pay), ``baselines`` (serving before paged attention).
"""

from refllm.decode.completion import CompletionOutput
from refllm.serve.adaptive_drafts import AdaptiveDrafting
from refllm.serve.admission import FirstCome, LongestPrefix, Order, Priority
from refllm.serve.async_engine import AsyncEngine, EngineClosed, RequestError, RequestStream
from refllm.serve.beam_search import BeamSearch
from refllm.serve.draft_costs import Costs, measure_costs
from refllm.serve.engine import Engine
from refllm.serve.factory import POLICIES
from refllm.serve.kv_manager import KVManager, PagedKVManager
from refllm.serve.minimal import MinimalEngine
from refllm.serve.outputs import RequestOutput
from refllm.serve.plan import Plan, SampledTokens, ScheduledSequence, SequenceUpdate
from refllm.serve.prefix_caching import HashKVManager, RadixKVManager
from refllm.serve.request import Request, Sequence
from refllm.serve.scheduler import Scheduler
from refllm.serve.swapping import SwappingKVManager

__all__ = [
    "POLICIES",
    "AdaptiveDrafting",
    "AsyncEngine",
    "BeamSearch",
    "CompletionOutput",
    "Costs",
    "Engine",
    "EngineClosed",
    "FirstCome",
    "HashKVManager",
    "KVManager",
    "LongestPrefix",
    "MinimalEngine",
    "Order",
    "PagedKVManager",
    "Plan",
    "Priority",
    "RadixKVManager",
    "Request",
    "RequestError",
    "RequestOutput",
    "RequestStream",
    "SampledTokens",
    "ScheduledSequence",
    "Scheduler",
    "Sequence",
    "SequenceUpdate",
    "SwappingKVManager",
    "measure_costs",
]
