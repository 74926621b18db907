"""Run time: from an engine directory to tokens."""
