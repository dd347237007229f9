"""The ensemble: checks of what goes in and comes out, draws, stopping, validators."""
