"""What a person at a terminal meets."""
