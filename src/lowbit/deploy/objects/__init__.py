"""Kubernetes objects from specs: one file a kind of thing, each a function from a spec to a tree (lowbit.deploy.template)."""
