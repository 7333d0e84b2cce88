"""The papers' claims about small batches and the project's own, each measured by a command."""
