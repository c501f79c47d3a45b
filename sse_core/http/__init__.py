"""From an accepted socket to an answer or a client."""
