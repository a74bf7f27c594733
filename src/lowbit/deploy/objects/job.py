"""Quantization: a Job (or an Indexed Job, one recipe a pod), its recipes in a ConfigMap, its volumes.

The artifact grows beside its place on the output volume, with a journal, and is renamed when it is done: a pod that is
evicted costs the block in hand, and the next one goes on.
"""

from __future__ import annotations

from lowbit.deploy.objects import pod
from lowbit.deploy.objects.network import job_policy
from lowbit.deploy.quantity import gibibytes
from lowbit.deploy.spec import QuantizeSpec
from lowbit.deploy.template import Release, Template, Tree, Value

COMPONENT = "quantize"
RECIPES = "/recipes"
# what lowbit exits with when trying again cannot help: wrong flags, or a result that is not good enough
_FINAL = [2, 3]


def quantize_templates(spec: QuantizeSpec) -> list[Template]:
    """Every object of a quantization, in the order that they are applied."""
    templates = [Template("serviceaccount.yaml", _service_account()), Template("recipes.yaml", _recipes(spec))]
    if spec.create_claim:
        templates.append(Template("output.yaml", _output(spec)))
    policy = Template("networkpolicy.yaml", job_policy(spec), ("networkPolicy.enabled", True))
    return [*templates, policy, Template("job.yaml", _job(spec))]


def _service_account() -> Tree:
    return {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": pod.metadata(COMPONENT),
            "automountServiceAccountToken": False}  # fmt: skip


def _recipes(spec: QuantizeSpec) -> Tree:
    data = {f"{index}.yaml": run.recipe for index, run in enumerate(spec.runs)}
    outputs = {f"{index}.output": run.output for index, run in enumerate(spec.runs)}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": pod.metadata(COMPONENT, "-recipes"),
            "data": {**data, **outputs}}  # fmt: skip


def _output(spec: QuantizeSpec) -> Tree:
    storage = {"storageClassName": Value("output.storageClass", spec.storage_class, "")} if spec.storage_class else {}
    # pods of a sweep run on several nodes
    mode = "ReadWriteMany" if len(spec.runs) > 1 and spec.parallel > 1 else "ReadWriteOnce"
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {
            **pod.metadata(COMPONENT),
            "name": Value("output.claim", spec.output_claim, "Claim of artifacts."),
        },
        "spec": {
            "accessModes": [mode],
            **storage,
            "resources": {"requests": {"storage": Value("output.size", gibibytes(spec.output_bytes), "Of the claim.")}},
        },
    }


def _job(spec: QuantizeSpec) -> Tree:
    several = len(spec.runs) > 1
    queue = {"kueue.x-k8s.io/queue-name": spec.queue} if spec.queue else {}
    metadata = pod.metadata(COMPONENT)
    metadata["labels"] = {**metadata["labels"], **queue}
    indexed: dict[str, Tree] = {}
    if several:
        parallel = Value("parallel", spec.parallel, "Pods at once.")
        # one bad recipe must not take the others with it
        indexed = {"completionMode": "Indexed", "completions": len(spec.runs), "parallelism": parallel,
                   "backoffLimitPerIndex": spec.retries, "maxFailedIndexes": len(spec.runs)}  # fmt: skip
    stop = "FailIndex" if several else "FailJob"
    rules: list[Tree] = [
        # evictions are no fault of the run, and cost only the block in hand
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        {"action": stop, "onExitCodes": {"containerName": COMPONENT, "operator": "In", "values": _FINAL}},
    ]
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": metadata,
        "spec": {
            **({"suspend": True} if spec.queue else {}),
            **(indexed or {"backoffLimit": spec.retries}),
            "activeDeadlineSeconds": Value("deadline", spec.deadline, "Seconds for all tries together."),
            "ttlSecondsAfterFinished": Value("keep", spec.keep, "Seconds until a finished Job is removed."),
            "podFailurePolicy": {"rules": rules},
            "template": {
                "metadata": {"labels": {**pod.selector(COMPONENT), "app.kubernetes.io/component": COMPONENT}},
                "spec": _pod(spec),
            },
        },
    }


def _pod(spec: QuantizeSpec) -> Tree:
    volumes: list[Tree] = [
        {"name": "recipes", "configMap": {"name": Release("-recipes")}},
        {"name": "output", "persistentVolumeClaim": {"claimName": Value("output.claim", spec.output_claim, "")}},
        *pod.scratch_volumes(spec),
    ]
    if spec.model_claim:
        claim = Value("model.claim", spec.model_claim, "PersistentVolumeClaim with the checkpoint.")
        volumes.append({"name": "models", "persistentVolumeClaim": {"claimName": claim, "readOnly": True}})
    return {
        "serviceAccountName": Release(),
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "restartPolicy": "Never",  # what podFailurePolicy asks for; the next pod may be on another node
        "securityContext": pod.pod_security(),
        "terminationGracePeriodSeconds": 60,
        **pod.placement(spec),
        "containers": [_container(spec)],
        "volumes": volumes,
    }


def _container(spec: QuantizeSpec) -> Tree:
    mounts: list[Tree] = [
        {"name": "recipes", "mountPath": RECIPES, "readOnly": True},
        {"name": "output", "mountPath": pod.OUTPUT},
        *pod.scratch_mounts(),
    ]
    if spec.model_claim:
        mounts.append({"name": "models", "mountPath": pod.MODELS, "readOnly": True})
    offline = [{"name": "HF_HUB_OFFLINE", "value": "1"}] if spec.offline else []
    return {
        "name": COMPONENT,
        "image": pod.image(spec.image),
        "imagePullPolicy": pod.always_pull(),
        "command": list(spec.command),
        "args": list(spec.args),
        "env": [*pod.environment(spec), *offline, *pod.token(spec)],
        "resources": pod.resources(spec),
        "securityContext": pod.container_security(),
        "volumeMounts": mounts,
    }
