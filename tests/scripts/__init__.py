"""Tests of what a person runs by hand: fetching the models, training the draft."""
