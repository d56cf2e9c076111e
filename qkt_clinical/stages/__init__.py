"""Stages that run networks: each reads inputs, calls pure functions and writes its outputs in one step."""
