"""Quantization over several nodes: a JobSet whose pods torchrun joins.

Fields as in jobset.x-k8s.io/v1alpha2 (kubernetes-sigs/jobset, api/jobset/v1alpha2/jobset_types.go).
"""

from __future__ import annotations

from lowbit.deploy.spec import QuantizeSpec
from lowbit.deploy.template import Release, Text, Tree, Value

NODE = "node"
PORT = 29500
# seconds that a pod waits for the others, whose images may still be on their way
_PATIENCE = 1800
# a JobSet's pods are called NAME-node-0-INDEX-abcde, which is a label of at most 63 characters
LONGEST_NAME = 63 - len(f"-{NODE}-0-99-abcde")


def torchrun(spec: QuantizeSpec, gpus: Tree) -> list[Tree]:
    """Arguments of torchrun in front of the module that it starts in every process.

    The static rendezvous says which pod holds the store: its index. c10d would let every pod find out by DNS whether it is
    the one, and a pod whose own record is not published yet finds out wrongly."""
    return [
        "--nnodes", str(spec.nodes), "--nproc-per-node", gpus, "--node-rank", "$(JOB_COMPLETION_INDEX)",
        "--master-addr", Text((Release(), f"-{NODE}-0-0.", Release())), "--master-port", str(PORT),
        "--rdzv-conf", f"timeout={_PATIENCE}", "-m",
    ]  # fmt: skip


def job_set(spec: QuantizeSpec, metadata: dict[str, Tree], pod: Tree) -> Tree:
    """The JobSet. metadata: its own. pod: template of its pods, with metadata and spec."""
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            **({"suspend": True} if spec.queue else {}),
            # a headless Service, which the controller makes; pods look for each other before they are ready
            "network": {"enableDNSHostnames": True, "subdomain": Release(), "publishNotReadyAddresses": True},
            "failurePolicy": {
                "maxRestarts": spec.retries,
                # no pod of the last try may still write when the next one begins
                "restartStrategy": "BlockingRecreate",
                # the only rule of the Job's own policy is about evictions, which are no fault of the run
                "rules": [{"name": "evicted", "action": "RestartJobSetAndIgnoreMaxRestarts",
                           "onJobFailureReasons": ["PodFailurePolicy"]}],
            },
            "ttlSecondsAfterFinished": Value("keep", spec.keep, "Seconds until a finished JobSet is removed."),
            "replicatedJobs": [{"name": NODE, "replicas": 1, "template": {"spec": _job(spec, pod)}}],
        },
    }  # fmt: skip


def _job(spec: QuantizeSpec, pod: Tree) -> Tree:
    disrupted = [{"type": "DisruptionTarget", "status": "True"}]
    return {
        "completionMode": "Indexed",
        "completions": spec.nodes,
        "parallelism": spec.nodes,
        # without one of them the others hang: all begin again, from the journal
        "backoffLimit": 0,
        "activeDeadlineSeconds": Value("deadline", spec.deadline, "Seconds of a try."),
        "podFailurePolicy": {"rules": [{"action": "FailJob", "onPodConditions": disrupted}]},
        "template": pod,
    }
