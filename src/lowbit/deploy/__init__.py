"""Kubernetes objects (and compose, systemd and Ollama files) for quantizing and serving; a validator for anyone's.

Plain dictionaries all the way: nothing here needs a cluster or a Kubernetes package, but `cluster`, which applies them.
"""
