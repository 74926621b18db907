"""Tests mirror the packages; the helpers they share live at the top."""
