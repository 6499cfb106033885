"""The demo, the run on a real model, the recipe, and comparisons of methods."""
