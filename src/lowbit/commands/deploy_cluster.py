"""lowbit deploy plan, apply, delete."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from lowbit.core.errors import RecipeError

Paths = Annotated[list[Path], typer.Argument(metavar="PATH...", help="YAML files, folders, Kustomize trees.")]
Namespace = Annotated[
    str | None,
    typer.Option("--namespace", "-n", help="Namespace of objects that name none.", show_default="the context's"),
]
Context = Annotated[str | None, typer.Option(help="Context of the kubeconfig.")]
Kubeconfig = Annotated[
    Path | None, typer.Option(help="kubeconfig file; inside a cluster its service account is taken.")
]


def plan(paths: Paths, as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """What the objects will take of a cluster: pods, GPUs, CPUs, memory and disk. Nothing is asked of the cluster.

    Example: lowbit deploy plan deploy/kustomize/overlays/prod
    """
    from lowbit.deploy.cost import claims, costs, gib, total
    from lowbit.deploy.documents import read_objects

    contents = read_objects(paths)
    found, disks = costs(contents), claims(contents)
    fields = ("gpus", "cpu", "memory", "scratch")
    if as_json:
        sums = {"least": {f: total(found, f) for f in fields}, "most": {f: total(found, f, most=True) for f in fields}}
        print(json.dumps({"workloads": [cost.to_dict() for cost in found], "claims": disks, "total": sums}, indent=2))
        return
    for cost in found:
        pods = f"{cost.least}" if cost.least == cost.most else f"{cost.least} to {cost.most}"
        print(f"{cost.name}: {pods} pods of {cost.gpus:g} GPUs, {cost.cpu:g} cores, {gib(cost.memory)} of memory, "
              f"{gib(cost.scratch)} of scratch disk")  # fmt: skip
    for name, nbytes in disks.items():
        print(f"PersistentVolumeClaim/{name}: {gib(nbytes)}")
    for word, most in (("at least", False), ("at most", True)):
        gpus, cpu, memory, _ = (total(found, field, most=most) for field in fields)
        print(f"{word}: {gpus:g} GPUs, {cpu:g} cores, {gib(memory)} of memory")


def apply(
    paths: Paths,
    dry_run: Annotated[
        str | None, typer.Option(metavar="server", help="The cluster checks all and keeps nothing.")
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Until servers are ready and Jobs are done.")] = False,
    timeout: Annotated[float, typer.Option(help="Seconds to wait.")] = 1800,
    force_conflicts: Annotated[
        bool, typer.Option("--force-conflicts", help="Take over fields that others manage.")
    ] = False,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Apply objects by server-side apply; with --wait tell why it failed: states, events, the ends of logs.

    Example: lowbit deploy apply deploy/kustomize/overlays/prod --namespace models --wait
    """
    from lowbit.deploy.cluster import apply_all, connect
    from lowbit.deploy.documents import read_objects
    from lowbit.deploy.rollout import wait as wait_for

    if dry_run not in (None, "server"):
        raise RecipeError(
            f"--dry-run {dry_run!r} is unknown", hint="--dry-run server; lowbit deploy validate needs no cluster"
        )
    contents = read_objects(paths)
    cluster = connect(context=context, kubeconfig=kubeconfig, namespace=namespace)
    apply_all(cluster, contents, _say, dry_run=dry_run is not None, force=force_conflicts)
    if wait and dry_run is None:
        wait_for(cluster, contents, _say, timeout=timeout)


def delete(
    paths: Paths,
    with_data: Annotated[
        bool, typer.Option("--with-data", help="Delete claims too: the artifacts on them are lost.")
    ] = False,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Delete what was applied; claims are kept unless --with-data is given.

    Example: lowbit deploy delete deploy/kustomize/overlays/prod --namespace models
    """
    from lowbit.deploy.cluster import connect, delete_all
    from lowbit.deploy.documents import read_objects

    contents = read_objects(paths)
    delete_all(
        connect(context=context, kubeconfig=kubeconfig, namespace=namespace), contents, _say, with_data=with_data
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
