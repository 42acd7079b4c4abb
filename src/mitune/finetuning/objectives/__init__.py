"""What an adapter is trained towards: one file each. `finetune.objective` names one."""
