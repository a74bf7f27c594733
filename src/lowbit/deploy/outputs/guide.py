"""README.md of a deployment's folder: what has to be there before, and the commands."""

from __future__ import annotations

from lowbit.deploy.objects.pod import MODELS
from lowbit.deploy.quantity import gibibytes
from lowbit.deploy.spec import QuantizeSpec, ServeSpec


def serve_guide(spec: ServeSpec, title: str, namespace: str) -> str:
    """For a server."""
    option = f" -n {namespace}" if namespace else ""
    steps = []
    if spec.api_key_variable and spec.api_key_secret:
        steps.append(
            "The API key, which no file here holds:\n\n"
            f"       kubectl{option} create secret generic {spec.api_key_secret} --from-literal=api-key=$(openssl rand -hex 24)"
        )
    else:
        steps.append("No API key is asked for: put a gateway that does before it, or keep the network policy.")
    if spec.source.kind == "claim" and not spec.kserve:
        steps.append(
            f"A PersistentVolumeClaim `{spec.source.ref}` with the model at `{spec.source.path or '/'}`, mounted read-only. "
            "Pods on several nodes need ReadOnlyMany or ReadWriteMany."
        )
    if spec.source.kind == "image":
        steps.append(f"Image volumes (on by default since Kubernetes 1.35) for `{spec.source.ref}`.")
    if spec.source.kind == "pull" and not spec.kserve:
        steps.append("Every pod downloads the model when it starts; a claim or an image volume starts faster.")
    needs = {
        "keda": "KEDA, and Prometheus where the chart's `autoscaling.prometheus` says.",
        "hpa": "prometheus-adapter, which gives the runtime's queue to the autoscaler (metrics-server for CPUs).",
    }
    if spec.autoscale in needs:
        steps.append(needs[spec.autoscale])
    if spec.metrics_path and spec.monitoring:
        steps.append(
            "The Prometheus operator, for the ServiceMonitor (overlay prod; chart: monitoring.enabled). If yours selects by a "
            "label (often `release`), add it."
        )
    if spec.nodes > 1:
        steps.append("The LeaderWorkerSet controller.")
    if spec.kserve:
        steps.append("KServe with LLMInferenceService (v1alpha2).")
    if spec.gpus:
        steps.append("Nodes with the NVIDIA device plugin.")
    numbered = "\n".join(f"{number}. {step}" for number, step in enumerate(steps, 1))
    gpus = f"{spec.gpus} GPU{'s' * (spec.gpus != 1)}"
    return f"""# {spec.name}: {title}

What has to be there first:

{numbered}

Check, see what it costs, apply (one of the two):

    lowbit deploy validate kustomize/overlays/prod
    lowbit deploy plan kustomize/overlays/prod
    lowbit deploy apply kustomize/overlays/prod{option.replace("-n", "--namespace")} --wait
    helm{option} upgrade --install {spec.name} chart --wait

Ask it:

    kubectl{option} port-forward service/{spec.name} 8080:80
    curl localhost:8080/v1/chat/completions -H "Authorization: Bearer $KEY" -H 'Content-Type: application/json' \\
      -d '{{"model": "{spec.model}", "messages": [{{"role": "user", "content": "Hello"}}]}}'

Sizes: {gibibytes(spec.weight_bytes)} of weights, {gibibytes(spec.memory)} of memory, {gpus} a pod.
"""


def quantize_guide(spec: QuantizeSpec, title: str, namespace: str) -> str:
    """For a Job."""
    option = f" -n {namespace}" if namespace else ""
    several = spec.nodes > 1
    modes = "ReadWriteMany, for pods on several nodes" if several else "artifacts and journal"
    steps = [
        f"A claim `{spec.model_claim}` with the checkpoint at `{spec.model.removeprefix(MODELS)}`"
        + (", ReadOnlyMany or ReadWriteMany." if several else ".")
        if spec.model_claim
        else f"The hub, from where {spec.model} is downloaded.",
        f"The claim `{spec.output_claim}` ({gibibytes(spec.output_bytes)}, {modes}): it "
        + ("is created." if spec.create_claim else "has to be there."),
        f"The image {spec.image.reference}: build it with docker/ of lowbit and push it to a registry of yours.",
    ]
    if several:
        steps.append("The JobSet controller (v1alpha2, 0.8 or newer).")
    if spec.queue:
        steps.append(f"Kueue with a LocalQueue `{spec.queue}`, which starts what is suspended.")
    if spec.gpus:
        steps.append("Nodes with the NVIDIA device plugin.")
    numbered = "\n".join(f"{number}. {step}" for number, step in enumerate(steps, 1))
    log = f"-f -l jobset.sigs.k8s.io/jobset-name={spec.name} --prefix" if several else f"-f job/{spec.name}"
    return f"""# {spec.name}: {title}

What has to be there first:

{numbered}

Check, see what it takes, apply (one of the two), follow:

    lowbit deploy validate kustomize/overlays/prod
    lowbit deploy plan kustomize/overlays/prod
    lowbit deploy apply kustomize/overlays/prod{option.replace("-n", "--namespace")} --wait
    helm{option} upgrade --install {spec.name} chart
    kubectl{option} logs {log}

A pod that is evicted costs the block in hand: the next one continues from the journal on the output volume. What runs
cannot be changed: delete it before applying another. `lowbit deploy delete` keeps the claim with the artifacts, unless
--with-data is given.
"""
