"""Screenshots of the page of ``kvp-edge serve`` for docs/: a chat of more tokens than cells.

python scripts/page_screenshots.py MODEL.gguf [--kv-budget N] [--out docs]

Needs pip install '.[server,page]' and a Chromium. With Qwen2.5-Coder-0.5B it takes some minutes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from makers.page import Server, launched, say

ROOT = Path(__file__).resolve().parent.parent
WIDE, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 780}

#: Characters of prose in the middle of the chat, which push its beginning out of the cells.
_MIDDLE = (3400, 3400)


def messages() -> list[str]:
    prose = (ROOT / "kvp_edge/data/prose.txt").read_text(encoding="utf-8")
    first, second = prose[: _MIDDLE[0]], prose[_MIDDLE[0] : sum(_MIDDLE)]
    return [
        "My boat is called Marigold. She lies at berth 14, and the spare key is taped under the "
        "red bench. Give me a short motto for her.",
        f"{first}\n\nAt which inn does this take place?",
        f"{second}\n\nWhat was the captain's ordinary habit?",
        "Write a short Python function that counts the words of a text.",
        "Where is the spare key of my boat?",
    ]


def settle(page: Any) -> None:
    """Wait until the panel shows which words asked, and nothing moves any more."""
    page.locator("#asked li").first.wait_for(timeout=60_000)
    page.evaluate("document.fonts.ready")
    page.mouse.move(0, 0)
    page.evaluate("document.activeElement.blur()")


def shoot(page: Any, out: Path, name: str) -> None:
    path = out / f"page-{name}.png"
    page.screenshot(path=path)
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model")
    parser.add_argument("--kv-budget", default="512")
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    args = parser.parse_args()
    settings = json.dumps({"temperature": 0, "maxTokens": 200})
    how = {"color_scheme": "light", "reduced_motion": "reduce"}
    server = Server(args.model, "--kv-budget", args.kv_budget)
    try:
        with launched() as browser:
            context = browser.new_context(viewport=WIDE, **how)
            context.add_init_script(f"localStorage['kvp-settings'] ??= {json.dumps(settings)}")
            page = context.new_page()
            page.goto(server.url)
            for message in messages():
                say(page, message, 600)
                print(page.locator(".assistant .body").last.inner_text(), flush=True)
            settle(page)
            page.locator("#passages button").nth(2).click()
            shoot(page, args.out, "light")
            page.emulate_media(color_scheme="dark")
            page.get_by_text("Map", exact=True).click()
            shoot(page, args.out, "dark")
            phone = browser.new_context(
                viewport=PHONE, device_scale_factor=2, is_mobile=True, has_touch=True, **how
            )
            small = phone.new_page()
            small.goto(page.url)
            small.locator(".assistant").last.wait_for()
            shoot(small, args.out, "phone")
    finally:
        server.end()


if __name__ == "__main__":
    main()
