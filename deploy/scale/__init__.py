"""Evaluation past one machine: images from anywhere, answered by the workers of a Ray cluster."""
