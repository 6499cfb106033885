"""Environment variables for the connection to teacher servers. This module does not import grpc.

They are variables, not settings, because every command that connects to a teacher uses them, and because secrets do not
belong in configuration files.
"""

TLS_CA = "KVDISTILL_TLS_CA"
TLS_CERT = "KVDISTILL_TLS_CERT"
TLS_KEY = "KVDISTILL_TLS_KEY"
TOKEN_FILE = "KVDISTILL_TOKEN_FILE"  # noqa: S105  a variable name, not a secret
# 0: K/V of teachers on the same machine come through the network too.
SHARED_MEMORY = "KVDISTILL_SHARED_MEMORY"
