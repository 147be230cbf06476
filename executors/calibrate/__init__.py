"""Holds the simulator against the live service: observe a run, replay its arrivals, compare the two."""
