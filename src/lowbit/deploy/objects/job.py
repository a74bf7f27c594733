"""Quantization: a Job (several recipes: an Indexed Job; several nodes: a JobSet), its recipes in a ConfigMap, its volumes.

The artifact grows beside its place on the output volume, with a journal, and is renamed when it is done: a pod that is
evicted costs the block in hand, and the next one goes on.
"""

from __future__ import annotations

from lowbit.deploy.objects import pod
from lowbit.deploy.objects.jobset import PORT, job_set, torchrun
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
    if spec.nodes > 1:
        return [*templates, policy, Template("jobset.yaml", job_set(spec, _metadata(spec), _template(spec)))]
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
    spread = spec.nodes > 1 or (len(spec.runs) > 1 and spec.parallel > 1)
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {
            **pod.metadata(COMPONENT),
            "name": Value("output.claim", spec.output_claim, "Claim of artifacts."),
        },
        "spec": {
            "accessModes": ["ReadWriteMany" if spread else "ReadWriteOnce"],
            **storage,
            "resources": {"requests": {"storage": Value("output.size", gibibytes(spec.output_bytes), "Of the claim.")}},
        },
    }


def _metadata(spec: QuantizeSpec) -> dict[str, Tree]:
    metadata = pod.metadata(COMPONENT)
    queue = {"kueue.x-k8s.io/queue-name": spec.queue} if spec.queue else {}
    return {**metadata, "labels": {**metadata["labels"], **queue}}


def _job(spec: QuantizeSpec) -> Tree:
    several = len(spec.runs) > 1
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
        "metadata": _metadata(spec),
        "spec": {
            **({"suspend": True} if spec.queue else {}),
            **(indexed or {"backoffLimit": spec.retries}),
            "activeDeadlineSeconds": Value("deadline", spec.deadline, "Seconds for all tries together."),
            "ttlSecondsAfterFinished": Value("keep", spec.keep, "Seconds until a finished Job is removed."),
            "podFailurePolicy": {"rules": rules},
            "template": _template(spec),
        },
    }


def _template(spec: QuantizeSpec) -> Tree:
    return {"metadata": {"labels": {**pod.selector(COMPONENT), "app.kubernetes.io/component": COMPONENT}},
            "spec": _pod(spec)}  # fmt: skip


def _pod(spec: QuantizeSpec) -> Tree:
    volumes: list[Tree] = [
        {"name": "recipes", "configMap": {"name": Release("-recipes")}},
        {"name": "output", "persistentVolumeClaim": {"claimName": Value("output.claim", spec.output_claim, "")}},
        *pod.scratch_volumes(spec),
    ]
    if spec.model_claim:
        claim = Value("model.claim", spec.model_claim, "PersistentVolumeClaim with the checkpoint.")
        volumes.append({"name": "models", "persistentVolumeClaim": {"claimName": claim, "readOnly": True}})
    if spec.shm:
        volumes.append(pod.shm_volume(spec.shm))
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
    if spec.shm:
        mounts.append({"name": "shm", "mountPath": "/dev/shm"})
    offline = [{"name": "HF_HUB_OFFLINE", "value": "1"}] if spec.offline else []
    ports = {"ports": [{"name": "rendezvous", "containerPort": PORT, "protocol": "TCP"}]} if spec.nodes > 1 else {}
    return {
        "name": COMPONENT,
        "image": pod.image(spec.image),
        "imagePullPolicy": pod.always_pull(),
        **_program(spec),
        "env": [*pod.environment(spec), *offline, *pod.token(spec)],
        **ports,
        "resources": pod.resources(spec),
        "securityContext": pod.container_security(),
        "volumeMounts": mounts,
    }


def _program(spec: QuantizeSpec) -> dict[str, Tree]:
    """Command and arguments; `python -m MODULE` becomes `torchrun ... -m MODULE` for several nodes."""
    gpus = Value("resources.gpus", str(spec.gpus), "")
    # the processes are as many as the GPUs
    follow = [index > 0 and spec.args[index - 1] == "--gpus" for index in range(len(spec.args))]
    args: list[Tree] = [gpus if linked else word for word, linked in zip(spec.args, follow, strict=True)]
    if spec.nodes == 1:
        return {"command": list(spec.command), "args": args}
    return {"command": ["torchrun"], "args": [*torchrun(spec, gpus), spec.command[-1], *args]}
