"""The command line: its commands, what their arguments stand for, what they print."""
