"""Ways from a model and prompts to variants of the model, which are judged: one file each. `--method` names one."""
