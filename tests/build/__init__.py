"""Tests of smc_build."""
