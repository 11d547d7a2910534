"""Tests of the GGUF reader and the block formats."""
