"""The native library (native/kvp_edge.h) as Python sees it. Nothing else knows of it."""
