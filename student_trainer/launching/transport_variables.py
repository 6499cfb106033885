"""Environment variables that say how teachers are reached. Free of grpc.

Variables rather than settings: they hold for every command that asks a teacher, and secrets stay out of configurations.
"""

TLS_CA = "KVDISTILL_TLS_CA"
TOKEN_FILE = "KVDISTILL_TOKEN_FILE"  # noqa: S105  the name of a variable
