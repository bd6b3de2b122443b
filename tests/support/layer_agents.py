"""Agents of whole layers that score what agents of single heads do."""

from __future__ import annotations

from dataclasses import replace

import torch

from kvp_edge.training.agent import Agents


def whole_layers(agents: Agents) -> Agents:
    """A network for each layer in which those of its heads stand side by side, and do not touch: H
    times as many hidden units, and 0 between those of different heads. Positions are standardised
    for all heads alike."""
    one = agents.shape
    n_heads, h, dk, dv = one.n_head_kv, one.hidden, one.head_size_k, one.head_size_v
    made = Agents(replace(one, scope="layer", hidden=n_heads * h))
    w, to = agents.state_dict(), {k: torch.zeros_like(v) for k, v in made.state_dict().items()}
    values = n_heads * dk  # where they begin among a layer's features
    place = values + n_heads * dv
    for layer in range(one.n_layer):
        for head in range(n_heads):
            agent, units = layer * n_heads + head, slice(head * h, (head + 1) * h)
            seen = [*range(head * dk, (head + 1) * dk)]
            seen += range(values + head * dv, values + (head + 1) * dv)
            seen += range(place, place + 4)
            for name in ("mean", "scale"):
                to[name][layer, seen] = w[name][agent]
            to["fc1"][layer, seen, units] = w["fc1"][agent]
            to["fc2"][layer, units, units] = w["fc2"][agent]
            for name in ("fc1_bias", "conv", "fc2_bias"):
                to[name][layer, units] = w[name][agent]
            mine = slice(head * n_heads * h + head * h, head * n_heads * h + (head + 1) * h)
            last = 0 if one.shared_out else layer
            to["out"][last, mine] = w["out"][0 if one.shared_out else agent]
    to["log_aggregate"] = w["log_aggregate"]
    made.load_state_dict(to)
    return made
