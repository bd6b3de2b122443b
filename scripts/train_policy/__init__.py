"""The recipe of the policy that comes with the bundled model; see docs/bundled-model.md."""
