"""Devices, hosts and signals."""
