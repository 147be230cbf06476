"""Runs plans on real hardware and measures what they cost; needs the extra `executors`."""
