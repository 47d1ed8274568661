"""How requests were served before paged attention: padded static batches, and memory that is
reserved at admission. The paged scheduler is measured against them.

| file                | read it for                                            |
|---------------------|--------------------------------------------------------|
| ``reservations``    | contiguous memory per request (the Orca baselines)     |
| ``static_batching`` | padded batches that run until the longest has finished |
"""

from refllm.serve.baselines.reservations import PaddedKVManager, ReservedKVManager
from refllm.serve.baselines.static_batching import StaticBatching

__all__ = ["PaddedKVManager", "ReservedKVManager", "StaticBatching"]
