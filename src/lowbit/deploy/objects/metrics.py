"""What runtimes export that says whether more pods are wanted.

Sources: vLLM, docs "Production Metrics"; llama.cpp, tools/server/README.md; TensorRT-LLM, tensorrt_llm/metrics.
"""

from __future__ import annotations

from lowbit.deploy.spec import Metric
from lowbit.deploy.template import Release, Text

QUEUES = {
    "vllm": Metric(name="vllm:num_requests_waiting", threshold=4),
    "llama.cpp": Metric(name="llamacpp:requests_deferred", threshold=2),
}


def query(metric: str) -> Text:
    """PromQL: the metric of all pods of the release."""
    return Text((f'sum({metric}{{service="', Release(), '"})'))
