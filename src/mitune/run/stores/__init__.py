"""Where the records of a run lie: one file each. `--store` names one."""
