"""Token selectors, one file each. Their names are in `kvcore.plan.SELECTORS`."""
