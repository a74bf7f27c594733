"""Files for people: Kustomize, Helm, compose, systemd, Ollama."""
