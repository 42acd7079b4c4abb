"""Who makes the records of a run, and in which order: one file each. `--executor` names one."""
