"""Fields that Kubernetes 1.37 knows (its API reference), for files that no schema is at hand for."""

from __future__ import annotations

CONTAINER = frozenset(
    ["name", "image", "imagePullPolicy", "command", "args", "workingDir", "env", "envFrom", "ports", "resources",
     "resizePolicy", "restartPolicy", "restartPolicyRules", "volumeMounts", "volumeDevices", "livenessProbe",
     "readinessProbe", "startupProbe", "lifecycle", "terminationMessagePath", "terminationMessagePolicy",
     "securityContext", "stdin", "stdinOnce", "tty"]
)  # fmt: skip
POD = frozenset(
    ["containers", "initContainers", "ephemeralContainers", "volumes", "restartPolicy",
     "terminationGracePeriodSeconds", "activeDeadlineSeconds", "dnsPolicy", "dnsConfig", "nodeSelector", "nodeName",
     "serviceAccountName", "serviceAccount", "automountServiceAccountToken", "hostNetwork", "hostPID", "hostIPC",
     "hostUsers", "hostname", "hostnameOverride", "subdomain", "shareProcessNamespace", "securityContext",
     "imagePullSecrets", "affinity", "schedulerName", "tolerations", "hostAliases", "priorityClassName", "priority",
     "preemptionPolicy", "overhead", "readinessGates", "runtimeClassName", "enableServiceLinks", "setHostnameAsFQDN",
     "topologySpreadConstraints", "os", "schedulingGates", "resourceClaims", "resources", "workloadRef",
     "schedulingGroup"]
)  # fmt: skip
DEPLOYMENT = frozenset(
    ["replicas", "selector", "template", "strategy", "minReadySeconds", "revisionHistoryLimit", "paused",
     "progressDeadlineSeconds"]
)  # fmt: skip
JOB = frozenset(
    ["template", "parallelism", "completions", "activeDeadlineSeconds", "podFailurePolicy", "successPolicy",
     "backoffLimit", "backoffLimitPerIndex", "maxFailedIndexes", "selector", "manualSelector",
     "ttlSecondsAfterFinished", "completionMode", "suspend", "podReplacementPolicy", "managedBy", "scheduling"]
)  # fmt: skip
# jobset.x-k8s.io/v1alpha2
JOBSET = frozenset(
    ["replicatedJobs", "network", "successPolicy", "failurePolicy", "startupPolicy", "suspend", "coordinator",
     "managedBy", "ttlSecondsAfterFinished", "volumeClaimPolicies"]
)  # fmt: skip
REPLICATED_JOB = frozenset(["name", "groupName", "template", "replicas", "dependsOn"])
# kinds that left an API version -> where they are now
REMOVED = {
    ("extensions/v1beta1", "Deployment"): "apps/v1",
    ("apps/v1beta1", "Deployment"): "apps/v1",
    ("apps/v1beta2", "Deployment"): "apps/v1",
    ("extensions/v1beta1", "Ingress"): "networking.k8s.io/v1",
    ("networking.k8s.io/v1beta1", "Ingress"): "networking.k8s.io/v1",
    ("batch/v1beta1", "CronJob"): "batch/v1",
    ("policy/v1beta1", "PodDisruptionBudget"): "policy/v1",
    ("autoscaling/v2beta1", "HorizontalPodAutoscaler"): "autoscaling/v2",
    ("autoscaling/v2beta2", "HorizontalPodAutoscaler"): "autoscaling/v2",
}
