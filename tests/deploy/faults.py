"""Manifests without a fault, faults that are seeded into them, and what is none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import yaml

Edit = Callable[[list[dict[str, Any]]], None]

GOOD = """
apiVersion: apps/v1
kind: Deployment
metadata: {name: server}
spec:
  progressDeadlineSeconds: 1800
  selector: {matchLabels: {app: server}}
  strategy: {rollingUpdate: {maxSurge: 0, maxUnavailable: 1}}
  template:
    metadata: {labels: {app: server}}
    spec:
      enableServiceLinks: false
      terminationGracePeriodSeconds: 60
      securityContext: {runAsNonRoot: true, runAsUser: 10001}
      nodeSelector: {nvidia.com/gpu.product: NVIDIA-L4}
      containers:
        - name: vllm
          image: vllm/vllm-openai:v0.32.0
          command: [vllm]
          args: [serve, /models/Llama-3.1-8B-awq, --port, "8000", --max-model-len, "8192"]
          env:
            - {name: HOME, value: /home/x}
            - {name: VLLM_API_KEY, valueFrom: {secretKeyRef: {name: key, key: api-key}}}
          ports: [{name: http, containerPort: 8000}]
          resources:
            requests: {cpu: "4", memory: 24Gi, nvidia.com/gpu: 1}
            limits: {memory: 24Gi, nvidia.com/gpu: 1}
          startupProbe: {httpGet: {path: /health, port: http}, periodSeconds: 10, failureThreshold: 60}
          readinessProbe: {httpGet: {path: /health, port: http}}
          livenessProbe: {httpGet: {path: /health, port: http}}
          lifecycle: {preStop: {sleep: {seconds: 10}}}
          securityContext: {readOnlyRootFilesystem: true}
          volumeMounts:
            - {name: models, mountPath: /models, readOnly: true}
            - {name: home, mountPath: /home/x}
            - {name: tmp, mountPath: /tmp}
            - {name: shm, mountPath: /dev/shm}
      volumes:
        - {name: models, persistentVolumeClaim: {claimName: models, readOnly: true}}
        - {name: home, emptyDir: {}}
        - {name: tmp, emptyDir: {}}
        - {name: shm, emptyDir: {medium: Memory, sizeLimit: 2Gi}}
---
apiVersion: v1
kind: Service
metadata: {name: server}
spec:
  selector: {app: server}
  ports: [{name: http, port: 80, targetPort: http}]
---
apiVersion: autoscaling/v2
kind: HorizontalPodAutoscaler
metadata: {name: server}
spec:
  scaleTargetRef: {apiVersion: apps/v1, kind: Deployment, name: server}
  minReplicas: 1
  maxReplicas: 4
  metrics: [{type: Resource, resource: {name: cpu, target: {type: Utilization, averageUtilization: 70}}}]
---
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata: {name: server}
spec:
  maxUnavailable: 1
  selector: {matchLabels: {app: server}}
---
apiVersion: monitoring.coreos.com/v1
kind: ServiceMonitor
metadata: {name: server}
spec:
  selector: {matchLabels: {app: server}}
  endpoints: [{port: http}]
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: llama}
spec:
  replicas: 2
  progressDeadlineSeconds: 1800
  selector: {matchLabels: {app: llama}}
  template:
    metadata: {labels: {app: llama}}
    spec:
      containers:
        - name: llama
          image: ghcr.io/ggml-org/llama.cpp:server-b11176
          args: [--model, /models/llama-2-7b-chat.Q4_K_M.gguf, --ctx-size, "4096", --threads, "8", --metrics, --host, 0.0.0.0,
                 --port, "8080", --n-gpu-layers, "0"]
          ports: [{name: http, containerPort: 8080}]
          resources:
            requests: {cpu: "8", memory: 8Gi}
            limits: {cpu: "8", memory: 8Gi}
          startupProbe: {httpGet: {path: /health, port: 8080}, failureThreshold: 60}
          readinessProbe: {httpGet: {path: /health, port: 8080}}
          volumeMounts: [{name: models, mountPath: /models, readOnly: true}]
      volumes:
        - {name: models, persistentVolumeClaim: {claimName: gguf, readOnly: true}}
---
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: gguf}
spec:
  accessModes: [ReadOnlyMany]
  resources: {requests: {storage: 10Gi}}
---
apiVersion: batch/v1
kind: Job
metadata: {name: quantize}
spec:
  backoffLimit: 3
  activeDeadlineSeconds: 86400
  ttlSecondsAfterFinished: 86400
  podFailurePolicy:
    rules: [{action: FailJob, onExitCodes: {containerName: quantize, operator: In, values: [2]}}]
  template:
    spec:
      restartPolicy: Never
      containers:
        - name: quantize
          image: registry.example.com/lowbit:1.0
          command: [python, -m, lowbit.deploy.job_entry]
          args: [--model, /models/llama]
          resources: {limits: {memory: 32Gi, nvidia.com/gpu: 1}}
---
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata: {name: together}
spec:
  ttlSecondsAfterFinished: 86400
  network: {enableDNSHostnames: true, subdomain: together}
  replicatedJobs:
    - name: node
      template:
        spec:
          completionMode: Indexed
          completions: 2
          parallelism: 2
          backoffLimit: 0
          activeDeadlineSeconds: 86400
          template:
            spec:
              restartPolicy: Never
              containers:
                - name: quantize
                  image: registry.example.com/lowbit:1.0
                  command: [torchrun]
                  args: [--nnodes, "2", --nproc-per-node, "8", --node-rank, $(JOB_COMPLETION_INDEX), --master-addr,
                         together-node-0-0.together, -m, lowbit, quantize, /models/llama]
                  resources: {limits: {memory: 32Gi, nvidia.com/gpu: 8}}
                  volumeMounts: [{name: shm, mountPath: /dev/shm}, {name: output, mountPath: /output}]
              volumes:
                - {name: shm, emptyDir: {medium: Memory, sizeLimit: 8Gi}}
                - {name: output, persistentVolumeClaim: {claimName: output}}
---
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: output}
spec:
  accessModes: [ReadWriteMany]
  resources: {requests: {storage: 10Gi}}
"""
VLLM, SERVICE, HPA, PDB, MONITOR, LLAMA, CLAIM, JOB, JOBSET, OUTPUT = range(10)


def pod(objects: list[dict[str, Any]], which: int) -> dict[str, Any]:
    if which == JOBSET:
        return inner(objects)["template"]["spec"]
    return objects[which]["spec"]["template"]["spec"]


def inner(objects: list[dict[str, Any]]) -> dict[str, Any]:
    return objects[JOBSET]["spec"]["replicatedJobs"][0]["template"]["spec"]


def box(objects: list[dict[str, Any]], which: int) -> dict[str, Any]:
    return pod(objects, which)["containers"][0]


def put(which: int, path: str, value: Any) -> Edit:
    """Set an entry; "c." begins at the first container, "p." at the pod, "j." at the JobSet's Job; "~" stands for "/" in a
    key; None takes it out."""

    def edit(objects: list[dict[str, Any]]) -> None:
        start, _, rest = path.partition(".")
        starts: dict[str, Any] = {"c": box, "p": pod, "j": lambda given, _: inner(given)}
        place: Any = starts[start](objects, which) if start in starts else objects[which][start]
        *above, last = (part.replace("~", "/") for part in rest.split("/"))
        for part in above:
            place = place[int(part)] if isinstance(place, list) else place.setdefault(part, {})
        if value is None:
            place.pop(last)
        else:
            place[int(last) if isinstance(place, list) else last] = value

    return edit


def more(which: int, *words: str) -> Edit:
    return lambda objects: box(objects, which)["args"].extend(words)


def model(which: int, name: str) -> Edit:
    return lambda objects: box(objects, which)["args"].__setitem__(1, name)


def both(*edits: Edit) -> Edit:
    return lambda objects: [edit(objects) for edit in edits] and None  # type: ignore[func-returns-value]


def add(which: int, path: str, *values: Any) -> Edit:
    return lambda objects: (box if path[0] == "c" else pod)(objects, which)[path[2:]].extend(values)


def as_job(objects: list[dict[str, Any]]) -> None:
    """The JobSet's Job on its own, which nobody gives a subdomain."""
    objects[JOBSET] = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "together"},
        "spec": inner(objects),
    }
    objects[JOBSET]["spec"]["ttlSecondsAfterFinished"] = 60
    box_of_job = objects[JOBSET]["spec"]["template"]["spec"]["containers"][0]
    box_of_job["args"][7] = "together-0.together"


FAULTS: list[tuple[str, str, Edit]] = [
    # the eleven of the list that schema tools were tried on
    ("selector", "app=server", put(VLLM, "spec.template/metadata/labels/app", "other")),
    ("quantity", "'32 GB' is no quantity", put(VLLM, "c.resources/limits/memory", "32 GB")),
    ("gpu-request", "must be equal", put(VLLM, "c.resources/requests/nvidia.com~gpu", 2)),
    ("dangling-mount", "'cache'", add(VLLM, "c.volumeMounts", {"name": "cache", "mountPath": "/cache"})),
    ("probe-port", "'web'", put(VLLM, "c.readinessProbe/httpGet/port", "web")),
    ("probe-port", "asks port 9090", put(LLAMA, "c.readinessProbe/httpGet/port", 9090)),
    ("restart-policy", "cannot be 'Always'", put(JOB, "p.restartPolicy", "Always")),
    ("name", "'My_Server' is no DNS label", put(SERVICE, "metadata.name", "My_Server")),
    ("volume-sources", "2 sources", put(VLLM, "p.volumes/0/emptyDir", {})),
    ("missing-field", "spec.selector is missing", put(VLLM, "spec.selector", None)),
    ("wrong-type", "not a number", put(LLAMA, "spec.replicas", "2")),
    ("unknown-field", "'volumeMount'", put(LLAMA, "c.volumeMount", [])),
    # shape
    ("unknown-field", "'imagePullpolicy'", put(LLAMA, "c.imagePullpolicy", "Always")),
    ("wrong-type", "8080 is no text", put(LLAMA, "c.args/10", 8080)),
    ("wrong-type", "variables are text", put(VLLM, "c.env/0/value", True)),
    ("wrong-type", "one text, not a list", put(JOB, "c.command", "python -m x")),
    ("removed-api", "left apps/v1beta1", lambda objects: objects[VLLM].update(apiVersion="apps/v1beta1")),
    ("missing-field", "has no image", put(LLAMA, "c.image", None)),
    # between objects
    ("service-selector", "leads nowhere", put(SERVICE, "spec.selector/app", "servers")),
    ("service-port", "no port 'web'", put(SERVICE, "spec.ports/0/targetPort", "web")),
    ("autoscaler-target", "no Deployment/serve", put(HPA, "spec.scaleTargetRef/name", "serve")),
    ("autoscaler-range", "at most 4 and at least 8", put(HPA, "spec.minReplicas", 8)),
    ("autoscaler-replicas", "set it back", put(VLLM, "spec.replicas", 2)),
    ("budget-selector", "app=serve", put(PDB, "spec.selector/matchLabels/app", "serve")),
    ("budget-blocks", "can be drained",
     both(put(PDB, "spec.selector/matchLabels/app", "llama"), put(PDB, "spec.minAvailable", 2))),
    ("monitor-port", "'metrics'", put(MONITOR, "spec.endpoints/0/port", "metrics")),
    ("claim-mode", "several pods", put(CLAIM, "spec.accessModes", ["ReadWriteOnce"])),
    ("service-links", "VLLM_PORT", both(put(SERVICE, "metadata.name", "vllm"), put(VLLM, "p.enableServiceLinks", None))),
    # the pod
    ("mount-twice", "/models is mounted twice", add(VLLM, "c.volumeMounts", {"name": "home", "mountPath": "/models"})),
    ("named-twice", "'HOME'", add(VLLM, "c.env", {"name": "HOME", "value": "/x"})),
    ("secret-in-plain", "VLLM_API_KEY", put(VLLM, "c.env/1", {"name": "VLLM_API_KEY", "value": "sk-1"})),
    ("secret-in-plain", "process list", more(VLLM, "--api-key", "sk-1")),
    ("image-unpinned", "newest", put(VLLM, "c.image", "vllm/vllm-openai:latest")),
    ("image-unpinned", "every day", put(LLAMA, "c.image", "ghcr.io/ggml-org/llama.cpp:server")),
    ("image-dead", "ggml-org", put(LLAMA, "c.image", "ghcr.io/ggerganov/llama.cpp:server-b11176")),
    ("privileged", "no privileges", put(VLLM, "c.securityContext/privileged", True)),
    ("root", "never starts", put(VLLM, "p.securityContext/runAsUser", 0)),
    ("read-only-home", "/tmp is not writable", put(VLLM, "c.volumeMounts/2/mountPath", "/temporary")),
    ("grace", "10 s of 10 s", put(VLLM, "p.terminationGracePeriodSeconds", 10)),
    ("writable-model", "readOnly",
     both(put(LLAMA, "c.volumeMounts/0/readOnly", None), put(LLAMA, "p.volumes/0/persistentVolumeClaim/readOnly", None))),
    # amounts
    ("request-above-limit", "more than the limit", put(LLAMA, "c.resources/requests/memory", "9Gi")),
    ("no-memory-limit", "too large", put(LLAMA, "c.resources/limits/memory", None)),
    ("gpu-fraction", "0.5 GPUs", both(put(VLLM, "c.resources/limits/nvidia.com~gpu", "500m"),
                                      put(VLLM, "c.resources/requests/nvidia.com~gpu", "500m"))),
    ("no-gpu", "needs a GPU", both(put(VLLM, "c.resources/limits/nvidia.com~gpu", None),
                                   put(VLLM, "c.resources/requests/nvidia.com~gpu", None))),
    ("tensor-parallel", "split over 4 GPUs", more(VLLM, "--tensor-parallel-size", "4")),
    ("idle-gpu", "has 2 GPUs and uses 1", both(put(VLLM, "c.resources/limits/nvidia.com~gpu", 2),
                                               put(VLLM, "c.resources/requests/nvidia.com~gpu", 2))),
    ("no-shm", "64 MiB", both(more(VLLM, "-tp=2"), put(VLLM, "c.volumeMounts/3/mountPath", "/shm"))),
    ("shm-on-disk", "on a disk", put(VLLM, "p.volumes/3/emptyDir/medium", "")),
    ("shm-unlimited", "half of the node", put(VLLM, "p.volumes/3/emptyDir/sizeLimit", None)),
    ("shm-above-limit", "not smaller", put(VLLM, "p.volumes/3/emptyDir/sizeLimit", "24Gi")),
    ("threads", "slower, not faster", put(LLAMA, "c.args/5", "16")),
    ("threads", "busy node", put(LLAMA, "c.resources/requests/cpu", "4")),
    # probes and ports
    ("server-port", "listens on 9000", put(VLLM, "c.args/3", "9000")),
    ("loopback", "loopback", put(LLAMA, "c.args/8", "127.0.0.1")),
    ("no-readiness", "still loads", put(LLAMA, "c.readinessProbe", None)),
    ("killed-while-loading", "within 30 s", put(VLLM, "c.startupProbe", None)),
    ("probe-key", "401", put(VLLM, "c.readinessProbe/httpGet/path", "/v1/models")),
    ("probe-path", "no /healthz", put(LLAMA, "c.readinessProbe/httpGet/path", "/healthz")),
    ("deadline", "given up after 60 s", put(VLLM, "spec.progressDeadlineSeconds", 60)),
    ("gpu-surge", "waits for a GPU", put(VLLM, "spec.strategy", None)),
    # Jobs
    ("restart-policy", "Always, which is the default", put(JOB, "p.restartPolicy", None)),
    ("job-deadline", "for ever", put(JOB, "spec.activeDeadlineSeconds", None)),
    ("job-ttl", "for ever", put(JOB, "spec.ttlSecondsAfterFinished", None)),
    ("failure-policy", "no container 'q'", put(JOB, "spec.podFailurePolicy/rules/0/onExitCodes/containerName", "q")),
    ("failure-policy", "Never only", put(JOB, "p.restartPolicy", "OnFailure")),
    ("queue", "queue has admitted", put(JOB, "metadata.labels", {"kueue.x-k8s.io/queue-name": "a"})),
    # pods and processes that work as one
    ("rendezvous", "no host names", put(JOBSET, "spec.network/enableDNSHostnames", False)),
    ("rendezvous", "no pod here is called together-node-0-0.together", put(JOBSET, "spec.network/subdomain", "group")),
    ("rendezvous", "no pod here is called group-node-0-0", put(JOBSET, "c.args/7", "group-node-0-0.together")),
    ("rendezvous", "loopback", put(JOBSET, "c.args/7", "localhost")),
    ("rendezvous", "loopback", put(JOBSET, "c.args/6", "--standalone")),
    ("rendezvous", "get ready only when they have met", both(
        put(JOBSET, "spec.network/publishNotReadyAddresses", False),
        put(JOBSET, "c.readinessProbe", {"exec": {"command": ["true"]}}))),
    ("rendezvous", "subdomain is not set", lambda objects: as_job(objects)),
    ("rendezvous", "no headless Service together", both(lambda objects: as_job(objects),
                                                        put(JOBSET, "spec.template/spec/subdomain", "together"))),
    ("torchrun-nodes", "waits for 2 pods, and 4 run", both(put(JOBSET, "j.parallelism", 4), put(JOBSET, "j.completions", 4))),
    ("torchrun-nodes", "waits for 3 pods, and 2 run", put(JOBSET, "c.args/1", "3")),
    ("torchrun-rank", "Indexed Jobs only", both(lambda objects: as_job(objects),
                                                put(JOBSET, "spec.completionMode", "NonIndexed"))),
    ("gpu-processes", "8 processes on 4 GPUs", put(JOBSET, "c.resources/limits/nvidia.com~gpu", 4)),
    ("gpu-processes", "4 processes on 1 GPUs", more(JOB, "--", "--gpus", "4")),
    ("no-shm", "8 processes exchange", put(JOBSET, "c.volumeMounts/0/mountPath", "/shm")),
    ("no-shm", "4 processes exchange", both(more(JOB, "--", "--gpus", "4"),
                                            put(JOB, "c.resources/limits/nvidia.com~gpu", 4))),
    ("claim-mode", "several pods run at once", put(OUTPUT, "spec.accessModes", ["ReadWriteOnce"])),
    ("group-restart", "replaced alone", put(JOBSET, "j.backoffLimit", 6)),
    ("job-deadline", "for ever", put(JOBSET, "j.activeDeadlineSeconds", None)),
    ("job-ttl", "for ever", put(JOBSET, "spec.ttlSecondsAfterFinished", None)),
    ("queue", "JobSet starts before", put(JOBSET, "metadata.labels", {"kueue.x-k8s.io/queue-name": "a"})),
    ("restart-policy", "cannot be 'Always'", put(JOBSET, "p.restartPolicy", "Always")),
    ("name", "65 characters of at most 63", put(JOBSET, "metadata.name", "t" * 50)),
    ("unknown-field", "'replica'", lambda objects: objects[JOBSET]["spec"]["replicatedJobs"][0].update(replica=1)),
    ("unknown-field", "'networks'", put(JOBSET, "spec.networks", {})),
    ("missing-field", "spec.replicatedJobs is missing", put(JOBSET, "spec.replicatedJobs", None)),
    # this field's own
    ("vllm-flag", "no --swap-space", more(VLLM, "--swap-space", "4")),
    ("vllm-flag", "no --task", more(VLLM, "--task=generate")),
    ("vllm-flag", "no --disable-log-requests", more(VLLM, "--disable-log-requests")),
    ("vllm-entrypoint", "deprecated", put(VLLM, "c.command", ["python", "-m", "vllm.entrypoints.openai.api_server"])),
    ("vllm-gguf", "vllm-gguf-plugin", model(VLLM, "/models/llama.gguf")),
    ("vllm-bitsandbytes", "vllm-bnb-plugin", more(VLLM, "--quantization", "bitsandbytes")),
    ("vllm-quantization", "reads awq from", more(VLLM, "--quantization=awq")),
    ("vllm-dtype", "its dtype", more(VLLM, "--dtype=float16")),
    ("gpu-memory", "no share", more(VLLM, "--gpu-memory-utilization", "90")),
    ("max-model-len", "no number", more(VLLM, "--max-model-len", "long")),
    ("llama-gpu", "the pod has none", put(LLAMA, "c.args/12", "99")),
    ("llama-gpu", "computes on the CPU", put(LLAMA, "c.resources/limits/nvidia.com~gpu", 1)),
    ("llama-format", "no GGUF file", model(LLAMA, "/models/llama-2-7b")),
    ("llama-metrics", "--metrics only", put(LLAMA, "c.args/6", "--no-webui")),
    ("context", "made for 4096", put(LLAMA, "c.args/3", "32768")),
    ("context", "made for 131072", put(VLLM, "c.args/5", "262144")),
    ("memory", "GiB are needed", put(LLAMA, "c.resources/limits/memory", "3Gi")),
    ("memory", "/dev/shm", put(VLLM, "c.resources/limits/memory", "8Gi")),
    ("fp8", "no FP8 units", both(model(VLLM, "/models/Llama-3.1-8B-fp8"),
                                 put(VLLM, "p.nodeSelector/nvidia.com~gpu.product", "NVIDIA-A100-SXM4-80GB"))),
    ("gpu-fit", "take about", model(VLLM, "/models/Llama-3.1-70B-awq")),
    ("autogptq", "never had a command line", put(JOB, "c.command", ["python", "-m", "auto_gptq.quantize"])),
    ("bnb-unread", "no library reads LOAD_IN_8BIT", add(VLLM, "c.env", {"name": "LOAD_IN_8BIT", "value": "true"})),
    ("bnb-value", "neither true nor false", add(VLLM, "c.env", {"name": "LOAD_IN_4BIT", "value": "si"})),
    ("bnb-both", "both asked for", add(VLLM, "c.env", {"name": "LOAD_IN_4BIT", "value": "true"},
                                       {"name": "LOAD_IN_8BIT", "value": "1"})),
]  # fmt: skip


def good() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(GOOD))


# what real charts do rightly, and a rule that is too eager would take for a fault
FINE: list[tuple[str, Edit]] = [
    ("another program of a runtime's image", both(put(LLAMA, "c.command", ["cache_server", "0.0.0.0", "81"]),
                                                  put(LLAMA, "c.args", []))),
    ("pods of another controller", lambda objects: objects.append(
        {"apiVersion": "ray.io/v1", "kind": "RayCluster", "metadata": {"name": "r"}, "spec": {}}) or
        put(SERVICE, "spec.selector", {"ray.io/cluster": "r"})(objects)),
    ("GPUs by a runtime class", both(put(VLLM, "p.runtimeClassName", "nvidia"),
                                     put(VLLM, "c.resources/limits/nvidia.com~gpu", None),
                                     put(VLLM, "c.resources/requests/nvidia.com~gpu", None))),
    ("pods with a torchrun of their own", lambda objects: inner(objects).update(parallelism=4, completions=9) or
        box(objects, JOBSET).update(args=["--standalone", "--nproc_per_node=8", "sweep.py"])),
    ("a restart policy that JobSet fills in", both(put(JOBSET, "p.restartPolicy", None),
                                                   put(JOBSET, "j.podFailurePolicy", {"rules": []}))),
    ("an elastic torchrun", put(JOBSET, "c.args/1", "1:4")),
    ("an address in a variable", put(JOBSET, "c.args/7", "$(MASTER_ADDR)")),
    ("a port that is not declared", lambda objects: box(objects, JOB).update(
        ports=[{"containerPort": 8443}], readinessProbe={"httpGet": {"path": "/ready", "port": 8081}})),
]  # fmt: skip
