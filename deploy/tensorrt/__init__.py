"""TensorRT: building an engine on its device, reading it back, and running it."""
