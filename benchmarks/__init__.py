"""Measurements of speed and memory beside torch's own layers."""
