"""Tests of smc_plugin."""
