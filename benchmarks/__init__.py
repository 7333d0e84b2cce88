"""How fast the layers and whole training steps are beside torch's own: `python -m benchmarks --help`."""
