"""From a checkpoint to an engine directory.

The package owns the model description (`model_config`, `network`), the canonical weights (`weights`, `checkpoint`), the
engine directory (`engine_dir`) and the command that ties them together (`builder`, `cli`).
"""
