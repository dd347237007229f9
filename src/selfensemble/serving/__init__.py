"""An ensemble behind HTTP: requests and draws share passes."""
