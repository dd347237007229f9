"""What is written and read: saved ensembles, the Hub, the zoo, ONNX."""
