"""The log and the clients: one log of events, and cursors that move along it. No HTTP."""
