"""Records, public datasets and their mixture, and batches of records."""
