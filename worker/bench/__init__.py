"""The measurements of `worker bench`: speeds and bytes moved. Read bench.py, then result.py."""
