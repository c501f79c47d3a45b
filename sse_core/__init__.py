"""The parts of the server: one log of events, and clients that are cursors moving along it."""
__version__ = "2.0.0"
