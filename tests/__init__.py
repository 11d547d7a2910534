"""The tests, as a package, so that they can share their helpers: `from tests.tiny_models import make_tiny`."""
