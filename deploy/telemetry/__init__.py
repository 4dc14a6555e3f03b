"""What a device tells of its clocks, power and temperature. Only the TensorRT room asks."""
