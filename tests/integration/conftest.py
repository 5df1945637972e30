"""The fixtures of the integration tests; what they are made of is in service.py."""
from service import cluster, stories15m, stories260k, tiny  # noqa: F401
