"""Spherical motion dynamics on a noisy Rayleigh quotient, a simulation."""
