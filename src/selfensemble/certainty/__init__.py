"""What is certain of an answer: bounds, decisions, certificates, calibration, conformal sets."""
