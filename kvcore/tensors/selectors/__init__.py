"""Token selectors, one file each. `kvcore.plan.SELECTORS` has their names."""
