"""The tour: what does each part of refllm do, on a real model, in a minute and a half?

Read ``stops`` first: it lists the stops in order, and every stop is one function.

- ``stops``             the list of stops, and ``run``, which visits them
- ``context``           what the stops share: the model, where to print, where figures go
- ``model_stops``       the model, its text, its loss, the cost of a step, prefill and decode
- ``technique_stops``   quantised weights, number formats, a quantised KV cache
- ``speculation_stop``  speculative decoding with several drafters
- ``serving_stop``      a burst of requests through the engine, with and without a prefix cache
- ``chat_stop``         two questions to a pretrained chat model, where it is installed
"""

from refllm.tour.context import Tour
from refllm.tour.stops import STOPS, Stop, run

__all__ = ["STOPS", "Stop", "Tour", "run"]
