"""Measuring a bundle: latency, parity with the reference, and the machine they were measured on."""
