"""What scripts/train_task_pair.py is made of."""
