"""Parts of scripts/train_draft.py: a functional Llama, prompts, generation, the loss, training and measurement."""
