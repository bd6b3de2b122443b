"""Novels to train on that are nobody's: made-up words in plain sentences."""

from __future__ import annotations

from pathlib import Path

import numpy as np

SUBJECTS = ("dog", "garden", "window", "captain", "letter", "river", "morning", "lantern")
VERBS = ("saw", "loved", "found", "carried", "remembered", "painted", "followed", "described")


def write_books(folder: Path) -> Path:
    """Three small 'novels' with enough different words and names to fill the pools."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    letters, vowels = list("bcdfglmnprst"), list("aeiou")

    def syllables(count: int) -> str:
        return "".join(rng.choice(letters) + rng.choice(vowels) for _ in range(count))

    words = [syllables(int(rng.integers(2, 4))) for _ in range(900)]
    names = [syllables(2).capitalize() for _ in range(150)]
    for title in ("Anybody_First_1900", "Nobody_Second_1901", "Doyle_Hound_1902"):
        lines = []
        for _ in range(900):
            said = [str(rng.choice(words)) for _ in range(int(rng.integers(5, 14)))]
            lines.append(
                f"The {rng.choice(SUBJECTS)} of {rng.choice(names)} {rng.choice(VERBS)} "
                f"the {' '.join(said)}. Then {' '.join(reversed(said))}, it was said."
            )
        (folder / f"{title}.txt").write_text("\n\n".join(lines))
    return folder
