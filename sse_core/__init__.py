"""The parts of the server: events in at one end, one log, every client a cursor along it (README.md, `How it works`)."""
