"""Tools and forms of replies: what the model is shown, what it may write, and what that means."""

from kvp_edge.server.tools.offered import BadRequest, Reply, check

__all__ = ["BadRequest", "Reply", "check"]
