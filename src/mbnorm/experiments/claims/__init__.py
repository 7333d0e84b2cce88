"""The papers' claims about small batches, each measured by a command."""
