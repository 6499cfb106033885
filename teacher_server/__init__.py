"""A teacher server: holds one frozen model and streams its keys and values over gRPC (`kvdistill serve`)."""
