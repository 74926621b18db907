"""Quality: tasks with exact answers, run in every mode, and what they cost (`smc-eval`)."""
