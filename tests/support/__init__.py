"""Test support: tiny random models for llama.cpp and a numpy reference of their forward pass."""
