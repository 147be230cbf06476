"""Serves hybrid images for real: a cloud endpoint, the edge that finishes what it began, and the workers of both."""
