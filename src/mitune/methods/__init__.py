"""Ways from a model and prompts to variants of the model, which are then judged: one file each. `--method` names one."""
